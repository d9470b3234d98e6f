//! `events`: what a container uses, as runc prints it, and a line when its memory ran out.
//!
//! Owns: the JSON. Does not own: the counting, which the guest's kernel does.

use std::{io::Write, path::Path, thread, time::Duration};

use coffer_protocol::{Reply, Request, Stats};
use serde_json::{Value, json};

use super::find;
use crate::{cli::Call, client, error::Error, state::Status};

/// How often the stream looks for an end or for lost memory, whatever its interval.
const LOOK: Duration = Duration::from_secs(1);

/// Prints one line with `--stats`, else one each interval until the container has ended.
pub(super) fn events(call: &Call, root: &Path) -> Result<i32, Error> {
    let interval = interval(call.value("interval").unwrap_or("5s"))?;
    let (directory, record) = find(root, call.id()?)?;
    let mut seen: Option<u64> = None;
    let mut waited = Duration::ZERO;
    loop {
        if directory.status(&record) == Status::Stopped {
            // A stream ends with its container; one line cannot be had any more.
            return if seen.is_some() { Ok(0) } else { Err(Error::NotRunning) };
        }
        let stats = match client::ask(&directory.socket(), &Request::Stats { id: record.id.clone() }) {
            Ok(Reply::Stats(stats)) => stats,
            Ok(_) => return Err(Error::Vm("the guest answered out of order".into())),
            Err(_) if seen.is_some() => return Ok(0),
            Err(error) => return Err(error),
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

/// One object, at once.
fn line(value: &Value) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).map_err(crate::error::host("write to stdout"))
}

/// A duration as Go writes it: `5s`, `500ms`, `1m`.
fn interval(text: &str) -> Result<Duration, Error> {
    let wrong = || Error::Usage(format!("events: --interval {text}: a duration such as 5s is wanted"));
    let end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..end].parse().map_err(|_| wrong())?;
    let duration = match &text[end..] {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        "h" => Duration::from_secs(number.saturating_mul(3600)),
        _ => return Err(wrong()),
    };
    if duration.is_zero() { Err(wrong()) } else { Ok(duration) }
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

    #[test]
    fn intervals_are_gos() {
        assert_eq!(interval("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(interval("100ms").unwrap(), Duration::from_millis(100));
        for wrong in ["", "5", "s", "0s", "5x", "ä"] {
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
