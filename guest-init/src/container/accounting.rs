//! What a container uses: its cgroup's files, and /proc for its processes.
//!
//! Owns: reading and bounding them. Does not own: how callers want it printed.

use std::{collections::BTreeMap, fs, io::Read, path::Path};

use coffer_protocol::{CpuStats, Device, MAX_PAYLOAD, MemoryStats, ProcessInfo, Stats};

/// Most processes of one answer, and bytes of a command line: an answer must fit a frame. A letter of a command line takes two at most
/// there, and what else is said of a process no more than [`REST`].
const MOST_PROCESSES: usize = 4096;
const LONGEST_COMMAND: usize = 400;
const REST: usize = 200;

const _: () = assert!(MOST_PROCESSES * (2 * LONGEST_COMMAND + REST) < MAX_PAYLOAD);
/// USER_HZ, which Linux has fixed for what it tells programs.
const TICKS: u64 = 100;

/// `name value` lines.
fn pairs(text: &str) -> BTreeMap<String, u64> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

/// A limit: `max` is none.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N ...` lines.
fn devices(text: &str) -> Vec<Device> {
    let device = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut device =
            Device { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Device::default() };
        for (name, value) in words.filter_map(|w| w.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match name {
                "rbytes" => device.bytes[0] = value,
                "wbytes" => device.bytes[1] = value,
                "rios" => device.operations[0] = value,
                "wios" => device.operations[1] = value,
                _ => {}
            }
        }
        Some(device)
    };
    text.lines().filter_map(device).collect()
}

/// Reads a cgroup's account. A controller that is off counts nothing.
pub(super) fn stats(cgroup: &Path) -> Stats {
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    let number = |file: &str| limit(&read(file)).unwrap_or(0);
    let (cpu, events) = (pairs(&read("cpu.stat")), pairs(&read("memory.events")));
    let of = |from: &BTreeMap<String, u64>, name: &str| from.get(name).copied().unwrap_or(0);
    let nanoseconds = |name: &str| of(&cpu, name).saturating_mul(1000);
    Stats {
        cpu: CpuStats {
            total_ns: nanoseconds("usage_usec"),
            user_ns: nanoseconds("user_usec"),
            system_ns: nanoseconds("system_usec"),
            periods: of(&cpu, "nr_periods"),
            throttled_periods: of(&cpu, "nr_throttled"),
            throttled_ns: nanoseconds("throttled_usec"),
        },
        memory: MemoryStats {
            usage: number("memory.current"),
            limit: limit(&read("memory.max")),
            peak: number("memory.peak"),
            failures: of(&events, "max"),
            oom_kills: of(&events, "oom_kill"),
            swap: number("memory.swap.current"),
            swap_limit: limit(&read("memory.swap.max")),
            raw: pairs(&read("memory.stat")),
        },
        pids: number("pids.current"),
        pids_limit: limit(&read("pids.max")),
        devices: devices(&read("io.stat")),
    }
}

/// What is known of these processes; those that have ended meanwhile are left out. Without `command_lines` no word of those, which may
/// be secrets: names alone.
pub(super) fn processes(pids: &[u32], command_lines: bool) -> Vec<ProcessInfo> {
    let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot = pairs(&boot).get("btime").copied().unwrap_or(0);
    pids.iter().take(MOST_PROCESSES).filter_map(|pid| process(*pid, boot, command_lines)).collect()
}

fn process(pid: u32, boot: u64, command_lines: bool) -> Option<ProcessInfo> {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).ok();
    let stat = String::from_utf8_lossy(&read("stat")?).into_owned();
    let status = String::from_utf8_lossy(&read("status")?).into_owned();
    let uid = status.lines().find_map(|l| l.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok());
    // As long as the process likes, but only the beginning is read.
    let mut command = Vec::new();
    if command_lines && let Ok(file) = fs::File::open(format!("/proc/{pid}/cmdline")) {
        let _ = file.take(LONGEST_COMMAND as u64).read_to_end(&mut command);
    }
    let mut info = parse_stat(pid, &stat, boot)?;
    info.uid = uid.unwrap_or(0);
    if !command.is_empty() {
        let words = command.split(|b| *b == 0).filter(|w| !w.is_empty());
        info.command = words.map(String::from_utf8_lossy).collect::<Vec<_>>().join(" ");
    }
    info.command = shown(&info.command);
    Some(info)
}

/// What of a process's own words goes to the host: what does not print would take six letters there, and could be a line of another's.
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    shown.truncate(shown.floor_char_boundary(LONGEST_COMMAND));
    shown
}

/// proc(5), `/proc/PID/stat`: the name in brackets may have anything in it.
fn parse_stat(pid: u32, text: &str, boot: u64) -> Option<ProcessInfo> {
    let (before, after) = text.rsplit_once(')')?;
    let name = before.split_once('(')?.1;
    // The first of these is field 3.
    let fields: Vec<&str> = after.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|f| f.parse::<u64>().ok());
    let ticks = field(14)?.saturating_add(field(15)?);
    Some(ProcessInfo {
        pid,
        parent: u32::try_from(field(4)?).ok()?,
        uid: 0,
        started: boot.saturating_add(field(22)? / TICKS),
        cpu_ms: ticks.saturating_mul(1000 / TICKS),
        command: format!("[{name}]"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_cgroups_files_are_read_with_their_units() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write(
            "cpu.stat",
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 4\nnr_throttled 1\nthrottled_usec 7\n",
        );
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("memory.events", "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n");
        write("memory.stat", "anon 1\nfile 2\n");
        write("pids.current", "5\n");
        write("pids.max", "100\n");
        write("io.stat", "8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n");
        let stats = stats(directory.path());
        assert_eq!(
            (stats.cpu.total_ns, stats.cpu.user_ns, stats.cpu.throttled_ns),
            (1_500_000, 1_000_000, 7000)
        );
        assert_eq!((stats.memory.usage, stats.memory.limit, stats.memory.oom_kills), (4096, None, 2));
        assert_eq!((stats.memory.failures, stats.memory.raw["file"]), (3, 2));
        assert_eq!((stats.pids, stats.pids_limit), (5, Some(100)));
        assert_eq!(stats.devices, [Device { major: 8, minor: 16, bytes: [10, 20], operations: [1, 2] }]);
    }

    #[test]
    fn a_process_may_have_any_name() {
        let text = "7 (a) b ( c) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 12345 1000 10";
        let info = parse_stat(7, text, 1000).unwrap();
        assert_eq!((info.parent, info.cpu_ms, info.started), (1, 2000, 1123));
        assert_eq!(info.command, "[a) b ( c]");
    }

    #[test]
    fn this_process_is_there_with_its_command() {
        let list = processes(&[std::process::id()], true);
        assert_eq!((list.len(), list[0].pid), (1, std::process::id()));
        assert!(list[0].command.contains("coffer_init"), "{}", list[0].command);
        assert_eq!(list[0].parent, std::os::unix::process::parent_id());
    }

    #[test]
    fn of_a_program_whose_command_line_is_its_own_there_is_the_name() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let list = processes(&[child.id()], false);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(
            (list.len(), list[0].parent, list[0].command.as_str()),
            (1, std::process::id(), "[sleep]")
        );
    }

    proptest! {
        #[test]
        fn whatever_processes_are_called_they_fit_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..600), one in any::<u8>()) {
            for bytes in [bytes, vec![one; LONGEST_COMMAND]] {
                let most = ProcessInfo { pid: u32::MAX, parent: u32::MAX, uid: u32::MAX, started: u64::MAX, cpu_ms: u64::MAX,
                    command: shown(&String::from_utf8_lossy(&bytes)) };
                let length = serde_json::to_vec(&most).unwrap().len();
                prop_assert!(length < 2 * LONGEST_COMMAND + REST, "{}", length);
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}") {
            let _ = (pairs(&text), devices(&text), parse_stat(1, &text, 0));
        }
    }
}
