//! Medians, percentiles and ratios of a handful of runs.
//!
//! Owns: arithmetic on samples. Does not own: what a sample is.

/// A sorted, non-empty set of samples.
#[derive(Clone, Debug)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// `None` when there are no samples, or one is not a number.
    #[must_use]
    pub fn new(mut values: Vec<f64>) -> Option<Self> {
        if values.is_empty() || values.iter().any(|v| v.is_nan()) {
            return None;
        }
        values.sort_by(f64::total_cmp);
        Some(Self(values))
    }

    /// The value that `percent` of the samples do not exceed (nearest rank); 50 is the median.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    /// The median by nearest rank.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    /// Smallest sample.
    #[must_use]
    pub fn min(&self) -> f64 {
        self.0[0]
    }

    /// Largest sample.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    /// Number of samples.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// A ratio with the interval that holds it in 95 of 100 repetitions of the whole experiment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Of the medians.
    pub value: f64,
    /// Lower end of the 95 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Resamples of [`ratio`].
const RESAMPLES: usize = 2000;

/// The median of `of` by the median of `to`, with a percentile bootstrap interval (Efron 1979). The same samples give the
/// same interval: the generator starts from a constant.
#[must_use]
pub fn ratio(of: &Samples, to: &Samples) -> Ratio {
    let mut random = SplitMix(0x5eed);
    let mut ratios: Vec<f64> = (0..RESAMPLES)
        .map(|_| random.median_of(of) / random.median_of(to))
        .filter(|r| r.is_finite())
        .collect();
    ratios.sort_by(f64::total_cmp);
    let value = of.median() / to.median();
    let at = |part: f64| ratios.get((part * ratios.len() as f64) as usize).copied().unwrap_or(value);
    Ratio { value, low: at(0.025), high: at(0.975) }
}

/// Steele, Lea and Flood's SplitMix64: enough for resampling, and no dependency.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The median of as many samples as there are, drawn with replacement.
    fn median_of(&mut self, samples: &Samples) -> f64 {
        let count = samples.0.len();
        let mut drawn: Vec<f64> =
            (0..count).map(|_| samples.0[(self.next() % count as u64) as usize]).collect();
        drawn.sort_by(f64::total_cmp);
        drawn[(count - 1) / 2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_median_of_seven_is_the_fourth() {
        let samples = Samples::new(vec![7.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0]).unwrap();
        assert_eq!(samples.median(), 4.0);
        assert_eq!((samples.min(), samples.max()), (1.0, 7.0));
        assert_eq!(samples.percentile(90.0), 7.0);
    }

    #[test]
    fn nothing_has_no_median() {
        assert!(Samples::new(vec![]).is_none());
        assert!(Samples::new(vec![f64::NAN]).is_none());
    }

    #[test]
    fn a_ratio_is_inside_its_interval_and_the_interval_narrows_with_samples() {
        let samples = |n: usize, scale: f64| {
            Samples::new((0..n).map(|i| scale * (100.0 + (i * 7 % 13) as f64)).collect()).unwrap()
        };
        let few = ratio(&samples(7, 2.0), &samples(7, 1.0));
        let many = ratio(&samples(500, 2.0), &samples(500, 1.0));
        assert_eq!((few.value, many.value), (2.0, 2.0));
        assert!(
            few.low <= 2.0 && 2.0 <= few.high && many.high - many.low < few.high - few.low,
            "{few:?} {many:?}"
        );
    }

    proptest! {
        #[test]
        fn percentiles_are_samples_and_never_fall(values in prop::collection::vec(-1e9f64..1e9, 1..50)) {
            let samples = Samples::new(values.clone()).unwrap();
            let mut last = samples.min();
            for percent in 0..=100 {
                let value = samples.percentile(f64::from(percent));
                prop_assert!(values.contains(&value));
                prop_assert!(value >= last);
                last = value;
            }
        }
    }
}
