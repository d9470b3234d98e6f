//! Which options each command takes: runc's, and what callers pass to crun and to older runtimes.

/// An option: long name, other spellings, whether it takes a value.
pub(super) type Flag = (&'static str, &'static [&'static str], bool);

const BUNDLE: Flag = ("bundle", &["-b"], true);
const CONFIG: Flag = ("config", &["-f"], true);
const CONSOLE: Flag = ("console-socket", &[], true);
const PID_FILE: Flag = ("pid-file", &[], true);
const PRESERVE: Flag = ("preserve-fds", &[], true);
const NO_PIVOT: Flag = ("no-pivot", &[], false);
const NO_KEYRING: Flag = ("no-new-keyring", &[], false);
const FORMAT: Flag = ("format", &["-f"], true);
const DETACH: Flag = ("detach", &["-d"], false);

/// The options of a command; `None` when there is no such command.
pub(super) fn of(command: &str) -> Option<&'static [Flag]> {
    Some(match command {
        "create" => {
            &[BUNDLE, CONFIG, CONSOLE, PID_FILE, PRESERVE, NO_PIVOT, NO_KEYRING, ("no-subreaper", &[], false)]
        }
        "run" => &[
            BUNDLE,
            CONFIG,
            CONSOLE,
            PID_FILE,
            PRESERVE,
            NO_PIVOT,
            NO_KEYRING,
            DETACH,
            ("keep", &[], false),
            ("no-subreaper", &[], false),
        ],
        "start" | "state" | "pause" | "resume" | "features" | "doctor" => &[],
        "kill" => &[("all", &["-a"], false)],
        "delete" => &[("force", &["-f"], false)],
        "exec" => &[
            CONSOLE,
            PID_FILE,
            PRESERVE,
            DETACH,
            ("process", &["-p"], true),
            ("tty", &["-t"], false),
            ("user", &["-u"], true),
            ("additional-gids", &["-g"], true),
            ("cwd", &[], true),
            ("env", &["-e"], true),
            ("cap", &["-c"], true),
            ("no-new-privs", &[], false),
            ("process-label", &[], true),
            ("apparmor", &[], true),
            ("cgroup", &[], true),
            ("ignore-paused", &[], false),
        ],
        "template" => &[("memory", &["-m"], true), ("vcpus", &[], true), ("nets", &[], true)],
        "pool" => &[("count", &["-n"], true), ("image", &[], true)],
        "boot-chart" => &[("output", &["-o"], true)],
        "ps" => &[FORMAT],
        "list" => &[FORMAT, ("quiet", &["-q"], false)],
        "events" => &[("stats", &[], false), ("interval", &[], true)],
        "update" => &[
            ("resources", &["-r"], true),
            ("memory", &[], true),
            ("memory-reservation", &[], true),
            ("memory-swap", &[], true),
            ("kernel-memory", &[], true),
            ("kernel-memory-tcp", &[], true),
            ("cpu-period", &[], true),
            ("cpu-quota", &[], true),
            ("cpu-burst", &[], true),
            ("cpu-share", &["--cpu-shares"], true),
            ("cpu-rt-period", &[], true),
            ("cpu-rt-runtime", &[], true),
            ("cpu-idle", &[], true),
            ("cpuset-cpus", &[], true),
            ("cpuset-mems", &[], true),
            ("pids-limit", &[], true),
            ("blkio-weight", &[], true),
            ("l3-cache-schema", &[], true),
            ("mem-bw-schema", &[], true),
        ],
        "spec" => &[BUNDLE, ("rootless", &[], false)],
        _ => return None,
    })
}
