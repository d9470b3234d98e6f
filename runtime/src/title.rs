//! What a stub is called in lists of processes: the command of the process that it stands for.
//!
//! Owns: the command line in `/proc/PID/cmdline`. `podman top` takes it from there, for the process ids that it knows, and so does
//! who looks for what runs on a host. The short name stays `coffer`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
};

/// Fields of `/proc/PID/stat` from the state on, which is the third: where the words lie, where they end (proc(5)).
const ARG_START: usize = 48 - 3;
const ARG_END: usize = 49 - 3;

/// Shows these words as this process's command line, in the place of those that it was started with and cut to their length. Where
/// that cannot be, the old ones stay: nothing depends on it.
pub(crate) fn show(words: &[String]) {
    let _ = replace(words);
}

fn replace(words: &[String]) -> io::Result<()> {
    let Some((start, end)) = place(&fs::read_to_string("/proc/self/stat")?) else { return Ok(()) };
    // A change to bytes that nothing in this program reads once it runs. The file takes it without a pointer.
    File::options().write(true).open("/proc/self/mem")?.write_all_at(&text(words, end - start), start as u64)
}

/// Addresses of the words. The program's name, before the state, may have spaces and brackets.
fn place(stat: &str) -> Option<(usize, usize)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field)?.parse().ok();
    let (start, end) = (number(ARG_START)?, number(ARG_END)?);
    (start != 0 && start < end).then_some((start, end))
}

/// Words each with a zero at its end, and zeros up to this many bytes. The last one is zero in any case: with another the kernel
/// would go on reading in the environment.
fn text(words: &[String], room: usize) -> Vec<u8> {
    let mut text: Vec<u8> = words.iter().flat_map(|word| word.bytes().chain([0])).take(room - 1).collect();
    text.resize(room, 0);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_found_behind_any_name() {
        let numbers: Vec<String> = (4..53).map(|n| (n * 100).to_string()).collect();
        let stat = format!("7 (a) b (c) S {}\n", numbers.join(" "));
        assert_eq!(place(&stat), Some((4800, 4900)));
        assert_eq!(place("7 (a) S 1 2 3"), None);
        assert_eq!(place(&stat.replace("4900", "4700")), None);
        assert_eq!(place(""), None);
    }

    #[test]
    fn words_fill_the_room_and_never_its_last_byte() {
        let words = ["top".to_owned(), "-d".to_owned(), "2".to_owned()];
        assert_eq!(text(&words, 12), b"top\0-d\x002\0\0\0\0");
        assert_eq!(text(&words, 6), b"top\0-\0");
        assert_eq!(text(&words, 1), b"\0");
        assert_eq!(text(&[], 2), b"\0\0");
    }
}
