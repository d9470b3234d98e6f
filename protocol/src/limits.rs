//! Limits of the OCI configuration as files of cgroup version 2 have them: the guest sets them for the container, the host for the VM.
//!
//! Owns: the conversions, which are runc's. Pure.

/// CPU shares of version 1 (2 to 262144) as a weight of version 2 (1 to 10000).
#[must_use]
pub fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Block weight of version 1 (10 to 1000) as one of version 2 (1 to 10000).
#[must_use]
pub fn block_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

/// What to write into `cpu.max`, whose text is `now`: microseconds in each period of microseconds. What is not given, or zero,
/// stays; a negative quota is none.
#[must_use]
pub fn bandwidth(now: &str, quota: Option<i64>, period: Option<u64>) -> Option<String> {
    let (quota, period) = (quota.filter(|q| *q != 0), period.filter(|p| *p != 0));
    if quota.is_none() && period.is_none() {
        return None;
    }
    let mut words = now.split_whitespace();
    let (old_quota, old_period) = (words.next().unwrap_or("max"), words.next().unwrap_or("100000"));
    let quota = match quota {
        None => old_quota.to_owned(),
        Some(quota) if quota < 0 => "max".to_owned(),
        Some(quota) => quota.to_string(),
    };
    Some(format!("{quota} {}", period.map_or_else(|| old_period.to_owned(), |period| period.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_runcs() {
        assert_eq!([2, 1024, 22_000, 262_144, 500_000].map(cpu_weight), [1, 39, 840, 10_000, 10_000]);
        assert_eq!([10, 100, 500, 1000, 2000].map(block_weight), [1, 910, 4950, 10_000, 10_000]);
    }

    #[test]
    fn a_quota_or_period_that_is_not_given_stays() {
        let of = |now, quota, period| bandwidth(now, quota, period).unwrap_or_default();
        assert_eq!(of("max 100000\n", Some(5000), None), "5000 100000");
        assert_eq!(of("max 100000\n", None, Some(250_000)), "max 250000");
        assert_eq!(of("5000 100000", None, Some(50_000)), "5000 50000");
        assert_eq!(of("5000 50000", Some(7000), None), "7000 50000");
        assert_eq!(of("5000 50000", Some(-1), None), "max 50000");
        assert_eq!(of("", Some(7000), Some(20_000)), "7000 20000");
        assert_eq!(bandwidth("5000 50000", Some(0), Some(0)), None);
    }
}
