//! The time as callers read it, and when this program began.

use std::{
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

static BEGAN: OnceLock<u64> = OnceLock::new();

/// When this was first asked, which is what `main` does: nanoseconds of CLOCK_MONOTONIC, by which all processes of a host tell boot stages.
pub fn began_ns() -> u64 {
    *BEGAN.get_or_init(|| {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec; the clock always exists.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    })
}

/// The time now as RFC 3339, in UTC, with nanoseconds.
#[must_use]
pub fn now() -> String {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    rfc3339(elapsed.as_secs() as libc::time_t, elapsed.subsec_nanos())
}

/// Hours and minutes of a time in seconds since 1970, in UTC.
#[must_use]
pub fn time_of_day(seconds: u64) -> String {
    format!("{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60)
}

fn rfc3339(seconds: libc::time_t, nanoseconds: u32) -> String {
    // SAFETY: tm is plain data for which zero is valid.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    unsafe { libc::gmtime_r(&raw const seconds, &raw mut parts) };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{nanoseconds:09}Z",
        parts.tm_year + 1900,
        parts.tm_mon + 1,
        parts.tm_mday,
        parts.tm_hour,
        parts.tm_min,
        parts.tm_sec,
    )
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn a_known_second_has_its_known_words() {
        // The example of RFC 3339, section 5.8.
        assert_eq!(rfc3339(482_196_050, 520_000_000), "1985-04-12T23:20:50.520000000Z");
    }
}
