//! `events`: what a container uses, as runc prints it, and a line when its memory ran out.
//!
//! Owns: the JSON. Does not own: the counting, which the guest's kernel does.

use std::{
    ffi::OsStr,
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use coffer_protocol::{Reply, Request, Stats};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::{Value, json};

use super::find;
use crate::{
    cli::Call,
    client,
    error::{Error, host},
    state::{Directory, OUT_OF_MEMORY, Record, Status},
};

/// How often the stream looks for an end or for lost memory, whatever its interval.
const LOOK: Duration = Duration::from_secs(1);
/// How long a container's stub may take from its process's end to its own.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Prints one line with `--stats`, else one each interval until the container has ended.
pub(super) fn events(call: &Call, root: &Path) -> Result<i32, Error> {
    let interval = interval(call.value("interval").unwrap_or("5s"))?;
    let (directory, record) = find(root, call.id()?)?;
    let mark = Mark::watch(&directory);
    let mut seen: Option<u64> = None;
    let mut waited = Duration::ZERO;
    loop {
        if directory.status(&record) == Status::Stopped {
            // A stream ends with its container; one line cannot be had any more.
            return seen.map_or(Err(Error::NotRunning), |known| ended(&mark, &record, known));
        }
        let stats = match client::ask(&directory.socket(), &Request::Stats { id: record.id.clone() }) {
            Ok(Reply::Stats(stats)) => stats,
            Ok(_) => return Err(Error::Vm("the guest answered out of order".into())),
            Err(error) => return seen.map_or(Err(error), |known| ended(&mark, &record, known)),
        };
        if seen.is_some_and(|before| stats.memory.oom_kills > before) {
            line(&json!({ "type": "oom", "id": record.id }))?;
        }
        if seen.is_none() || waited >= interval {
            line(&json!({ "type": "stats", "id": record.id, "data": data(&stats) }))?;
            waited = Duration::ZERO;
        }
        if call.has("stats") {
            return Ok(0);
        }
        seen = Some(stats.memory.oom_kills);
        let step = LOOK.min(interval.saturating_sub(waited)).max(Duration::from_millis(10));
        thread::sleep(step);
        waited += step;
    }
}

/// The end of a stream that knows of so many processes killed for want of memory. What memory runs out for is mostly the container, and it has
/// ended before anybody looks again: its stub leaves a mark, which says of how many.
fn ended(mark: &Mark, record: &Record, known: u64) -> Result<i32, Error> {
    // One that does not end has no mark.
    let _ = record.stub.is_none_or(|stub| stub.wait(END_LIMIT));
    if mark.kills() > known {
        line(&json!({ "type": "oom", "id": record.id }))?;
    }
    Ok(0)
}

/// Whether a container's stub makes the mark that memory ran out. An engine deletes a container as soon as it has ended, and the mark with it;
/// the kernel keeps that it was there.
struct Mark {
    /// None where there are as many as a user may have: what is still there is seen all the same.
    watch: Option<Inotify>,
    directory: PathBuf,
}

impl Mark {
    fn watch(directory: &Directory) -> Self {
        let directory = directory.file("");
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let watch = inotify.and_then(|inotify| {
            inotify.add_watch(&directory, AddWatchFlags::IN_CREATE)?;
            Ok(inotify)
        });
        Self { watch: watch.ok(), directory }
    }

    /// Of how many processes it says that they were killed; none without it.
    fn kills(&self) -> u64 {
        let of = |name: &OsStr| name.to_str()?.strip_prefix(OUT_OF_MEMORY)?.strip_prefix('.')?.parse().ok();
        let events = std::iter::from_fn(|| self.watch.as_ref()?.read_events().ok()).flatten();
        let made = events.filter_map(|event| of(event.name.as_deref()?));
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        made.chain(entries.filter_map(|entry| of(&entry.file_name()))).max().unwrap_or(0)
    }
}

/// One object, at once.
fn line(value: &Value) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).map_err(host("write to stdout"))
}

/// A duration as Go writes it (time.ParseDuration): `5s`, `1.5s`, `1m30s`. None below zero, and not zero.
fn interval(text: &str) -> Result<Duration, Error> {
    let wrong = || Error::Usage(format!("events: --interval {text}: a duration such as 5s is wanted"));
    let mut left = text.strip_prefix('+').unwrap_or(text);
    let mut nanoseconds = 0u128;
    while !left.is_empty() {
        let end = left.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, rest) = left.split_at(end);
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let (unit, rest) = rest.split_at(end);
        let unit = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1;
        nanoseconds += part(number, unit).ok_or_else(wrong)?;
        left = rest;
    }
    let whole = u64::try_from(nanoseconds).ok().filter(|n| *n > 0).ok_or_else(wrong)?;
    Ok(Duration::from_nanos(whole))
}

/// Go's units in nanoseconds.
const UNITS: &[(&str, u128)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Digits of a number that matter: the smallest part of the largest unit has fewer.
const MOST_DIGITS: usize = 19;

/// Nanoseconds of a number with digits before the point, behind it, or both.
fn part(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || whole.len() > MOST_DIGITS {
        return None;
    }
    let fraction = &fraction[..fraction.len().min(MOST_DIGITS)];
    let value = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u128>().ok() };
    let below = value(fraction)? * unit / 10u128.pow(fraction.len() as u32);
    Some(value(whole)? * unit + below)
}

/// `data` of runc's events.
fn data(stats: &Stats) -> Value {
    let entry = |usage: u64, limit: Option<u64>, peak: u64, failures: u64| json!({ "limit": limit.unwrap_or(u64::MAX), "usage": usage, "max": peak, "failcnt": failures });
    let (cpu, memory) = (&stats.cpu, &stats.memory);
    let devices = |pick: fn(&coffer_protocol::Device) -> [u64; 2]| -> Vec<Value> {
        let two = |d: &coffer_protocol::Device| {
            let [read, write] = pick(d);
            [("Read", read), ("Write", write)]
                .map(|(op, value)| json!({ "major": d.major, "minor": d.minor, "op": op, "value": value }))
        };
        stats.devices.iter().flat_map(two).collect()
    };
    json!({
        "cpu": {
            "usage": { "total": cpu.total_ns, "percpu": [], "kernel": cpu.system_ns, "user": cpu.user_ns },
            "throttling": {
                "periods": cpu.periods, "throttledPeriods": cpu.throttled_periods, "throttledTime": cpu.throttled_ns
            }
        },
        "cpuset": {},
        "memory": {
            "cache": memory.raw.get("file").copied().unwrap_or(0),
            "usage": entry(memory.usage, memory.limit, memory.peak, memory.failures),
            "swap": entry(memory.swap, memory.swap_limit, 0, 0),
            "kernel": entry(0, None, 0, 0),
            "kernelTCP": entry(0, None, 0, 0),
            "raw": memory.raw
        },
        "pids": { "current": stats.pids, "limit": stats.pids_limit.unwrap_or(0) },
        "blkio": {
            "ioServiceBytesRecursive": devices(|d| d.bytes), "ioServicedRecursive": devices(|d| d.operations)
        },
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other than the first of a container's kills may be its last, and one that was told of already.
    #[test]
    fn a_mark_says_of_how_many_kills_though_the_container_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), "c").unwrap();
        directory.create().unwrap();
        let mark = Mark::watch(&directory);
        assert_eq!(mark.kills(), 0);
        for other in ["oom", "oom.", "oom.x", "started"] {
            std::fs::write(directory.file(other), "").unwrap();
        }
        assert_eq!(mark.kills(), 0);
        std::fs::write(directory.file("oom.3"), "").unwrap();
        let unwatched = Mark { watch: None, directory: directory.file("") };
        assert_eq!(unwatched.kills(), 3);
        directory.remove().unwrap();
        assert_eq!((mark.kills(), unwatched.kills()), (3, 0));
    }

    #[test]
    fn intervals_are_gos() {
        assert_eq!(interval("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(interval("100ms").unwrap(), Duration::from_millis(100));
        // What Go's own tests of time.ParseDuration have, of those above zero.
        for (text, nanoseconds) in [
            ("30s", 30_000_000_000),
            ("1478s", 1_478_000_000_000),
            ("+5s", 5_000_000_000),
            ("5.0s", 5_000_000_000),
            ("5.6s", 5_600_000_000),
            ("5.s", 5_000_000_000),
            (".5s", 500_000_000),
            ("1.004s", 1_004_000_000),
            ("100.00100s", 100_001_000_000),
            ("10ns", 10),
            ("11us", 11_000),
            ("12µs", 12_000),
            ("12μs", 12_000),
            ("13ms", 13_000_000),
            ("15m", 900_000_000_000),
            ("16h", 57_600_000_000_000),
            ("3h30m", 12_600_000_000_000),
            ("10.5s4m", 250_500_000_000),
            ("1h2m3s4ms5us6ns", 3_723_004_005_006),
            ("39h9m14.425s", 140_954_425_000_000),
            ("1m30s", 90_000_000_000),
        ] {
            assert_eq!(interval(text).unwrap(), Duration::from_nanos(nanoseconds), "{text}");
        }
        for wrong in [
            "",
            "5",
            "s",
            "0s",
            "5x",
            "ä",
            "-5s",
            ".",
            ".s",
            "+.s",
            "1d",
            "1.2.3s",
            "1m3",
            "99999999999h",
            "\u{85}\u{85}",
        ] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_has_no_limit_says_the_largest_number_as_runc_does() {
        let value = data(&Stats::default());
        assert_eq!(value["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(value["pids"]["limit"], 0);
    }
}
