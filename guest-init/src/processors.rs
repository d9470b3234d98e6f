//! Processors that the machine has and the kernel does not use, or shall not.
//!
//! Owns: which of them work. Does not own: how much of them a container gets.

use std::{fs, path::Path};

use coffer_protocol::ErrorKind;

use crate::{container::ContainerError, memory::in_tee};

const PROCESSORS: &str = "sys/devices/system/cpu";

/// Has the first `count` work and the others wait; the first always works.
///
/// # Errors
/// [`ContainerError`] in a TEE, or naming the first that the kernel does not start or stop.
pub(crate) fn set_online(count: u32) -> Result<(), ContainerError> {
    set_online_in(Path::new("/"), count)
}

fn set_online_in(root: &Path, count: u32) -> Result<(), ContainerError> {
    // No host of ours asks there: no processor waits.
    if in_tee(root) {
        let words = "processors: all of a guest in a TEE work from its boot on, and none is stopped";
        return Err(ContainerError::new(ErrorKind::Invalid, words));
    }
    let directory = root.join(PROCESSORS);
    let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
    let number = |name: &str| name.strip_prefix("cpu")?.parse::<u32>().ok();
    let mut numbers: Vec<u32> = entries.filter_map(|e| number(&e.file_name().to_string_lossy())).collect();
    numbers.sort_unstable();
    // A kernel that cannot stop the first has no file for it.
    for number in numbers.into_iter().filter(|number| *number > 0) {
        let file = directory.join(format!("cpu{number}/online"));
        let wanted = if number < count { "1" } else { "0" };
        if fs::read_to_string(&file).is_ok_and(|is| is.trim() == wanted) {
            continue;
        }
        let what = if number < count { "start" } else { "stop" };
        fs::write(&file, wanted)
            .map_err(|e| ContainerError::guest(&format!("{what} processor {number}"), e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root with the directory of processors, and that.
    fn root() -> (tempfile::TempDir, std::path::PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join(PROCESSORS);
        fs::create_dir_all(&directory).unwrap();
        (root, directory)
    }

    #[test]
    fn the_first_ones_work_and_the_others_wait() {
        let (root, directory) = root();
        fs::create_dir_all(directory.join("cpufreq")).unwrap();
        for (number, online) in [(0, None), (1, Some("0\n")), (2, Some("1\n")), (10, Some("0\n"))] {
            let path = directory.join(format!("cpu{number}"));
            fs::create_dir(&path).unwrap();
            online.iter().for_each(|text| fs::write(path.join("online"), text).unwrap());
        }
        let online = |count| {
            set_online_in(root.path(), count).unwrap();
            [1, 2, 10].map(|number| {
                let file = directory.join(format!("cpu{number}/online"));
                fs::read_to_string(file).unwrap().trim() == "1"
            })
        };
        assert_eq!(online(2), [true, false, false]);
        assert_eq!(online(64), [true, true, true]);
        assert_eq!(online(0), [false, false, false]);
        assert!(!directory.join("cpu0/online").exists());
    }

    #[test]
    fn a_processor_that_does_not_start_is_named() {
        let (root, directory) = root();
        fs::create_dir_all(directory.join("cpu1/online")).unwrap();
        let error = set_online_in(root.path(), 2).unwrap_err();
        assert!(error.to_string().contains("start processor 1"), "{error}");
    }

    #[test]
    fn a_guest_in_a_tee_stops_and_starts_none() {
        let (root, directory) = root();
        fs::create_dir(directory.join("cpu1")).unwrap();
        fs::write(directory.join("cpu1/online"), "1\n").unwrap();
        fs::create_dir(root.path().join("dev")).unwrap();
        fs::write(root.path().join("dev/sev-guest"), "").unwrap();
        let error = set_online_in(root.path(), 1).unwrap_err();
        assert!(error.to_string().contains("TEE"), "{error}");
        assert_eq!(fs::read_to_string(directory.join("cpu1/online")).unwrap(), "1\n");
    }
}
