//! Processors that the machine has and the kernel does not use, or shall not.
//!
//! Owns: which of them work. Does not own: how much of them a container gets.

use std::{fs, path::Path};

use crate::container::ContainerError;

const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Has the first `count` work and the others wait; the first always works.
///
/// # Errors
/// [`ContainerError`], naming the first that the kernel does not start or stop.
pub(crate) fn set_online(count: u32) -> Result<(), ContainerError> {
    set_online_in(Path::new(PROCESSORS), count)
}

fn set_online_in(directory: &Path, count: u32) -> Result<(), ContainerError> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
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

    #[test]
    fn the_first_ones_work_and_the_others_wait() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("cpufreq")).unwrap();
        for (number, online) in [(0, None), (1, Some("0\n")), (2, Some("1\n")), (10, Some("0\n"))] {
            let path = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&path).unwrap();
            online.iter().for_each(|text| fs::write(path.join("online"), text).unwrap());
        }
        let online = |count| {
            set_online_in(directory.path(), count).unwrap();
            [1, 2, 10].map(|number| {
                let file = directory.path().join(format!("cpu{number}/online"));
                fs::read_to_string(file).unwrap().trim() == "1"
            })
        };
        assert_eq!(online(2), [true, false, false]);
        assert_eq!(online(64), [true, true, true]);
        assert_eq!(online(0), [false, false, false]);
        assert!(!directory.path().join("cpu0/online").exists());
    }

    #[test]
    fn a_processor_that_does_not_start_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("cpu1")).unwrap();
        fs::create_dir(directory.path().join("cpu1/online")).unwrap();
        let error = set_online_in(directory.path(), 2).unwrap_err();
        assert!(error.to_string().contains("start processor 1"), "{error}");
    }
}
