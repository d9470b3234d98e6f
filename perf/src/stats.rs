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
