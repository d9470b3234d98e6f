//! Output without end: whoever reads late or slowly, nobody on the way keeps more than a window of it.

use std::{fs, io::Read, thread, time::Duration};

use coffer_replay::{Bench, config, finish};
use serde_json::Value;

/// MiB that a debug build of either program may have with all of its buffers.
const MOST_MIB: u64 = 64;
/// MiB that may come while what was read is many times as much.
const DRIFT_MIB: u64 = 4;

/// The largest memory that a process ever had, in MiB.
fn peak(pid: i64) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() >> 10
}

fn child(parent: i64) -> i64 {
    let of = |pid: i64| -> Option<i64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i64>().ok());
    pids.into_iter().find(|pid| of(*pid) == Some(parent)).unwrap()
}

#[test]
fn gigabytes_of_output_are_whole_and_nobody_keeps_them() {
    let bytes: u64 = if std::env::var_os("COFFER_TEST_LONG").is_some() { 10 << 30 } else { 256 << 20 };
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", &format!("head -c {bytes} /dev/zero; sleep 1000")]));
    let (mut output, into) = std::io::pipe().unwrap();
    let mut create = bench.command(&["create", "--bundle"]);
    create.arg(&bundle).arg("--pid-file").arg(bench.path("c.pid")).arg("c").stdout(into);
    assert_eq!(finish(&mut create.spawn().unwrap()), 0);
    drop(create);
    let _ = bench.call(&["start", "c"]).ok();
    // Nobody reads for a while: whoever kept what the program has ready would have much.
    thread::sleep(Duration::from_millis(500));
    let state: Value = serde_json::from_str(&bench.read("state/c/state.json")).unwrap();
    // The stub, and the guest's init: the stand-in's child's child.
    let relays = [i64::from(bench.pid("c")), child(child(state["vmm"]["pid"].as_i64().unwrap()))];
    let before = relays.map(peak);
    let mut buffer = vec![0; 1 << 20];
    let mut read = 0;
    while read < bytes {
        let count = output.read(&mut buffer).unwrap();
        assert!(count > 0, "it ends after {read} bytes");
        read += count as u64;
    }
    assert_eq!(read, bytes);
    let after = relays.map(peak);
    for (before, after) in before.into_iter().zip(after) {
        assert!(before <= MOST_MIB && after <= before + DRIFT_MIB, "{before} MiB, then {after} MiB");
    }
}
