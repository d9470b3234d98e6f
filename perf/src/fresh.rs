//! Memory of which an emulated processor remembers nothing.
//!
//! QEMU's own processor keeps what it has translated by the page of physical memory that the code was in, and forgets it when that page is
//! written. A start that is given pages in which the guest before it ran its kernel pays for that: 8 to 74 ms for a page of 2 MiB that takes 1 ms
//! otherwise (perf/README.md). No processor does so, and it is not the start's own doing, so all free memory is written before each start.
//!
//! Owns: knowing such a processor, and the writing. Does not own: when.

use std::{arch::x86_64::__cpuid, fs, io, ptr};

/// What a virtual machine's processor calls the program that makes it (CPUID leaf 0x4000_0000), when that is QEMU's translator.
const TRANSLATOR: &[u8; 12] = b"TCGTCGTCGTCG";
/// KiB of free memory that stay free: what the kernel wants while the rest is taken.
const SPARED_KIB: u64 = 96 << 10;
/// Bytes of a page.
const PAGE: usize = 4096;

/// Whether this machine's processor is QEMU's translator. KVM's guests, which may run on one, have another name there.
#[must_use]
pub fn is_translated() -> bool {
    // CPUID leaf 1, ECX bit 31: a virtual machine; without it the leaf asked for next means nothing.
    if __cpuid(1).ecx >> 31 == 0 {
        return false;
    }
    let leaf = __cpuid(0x4000_0000);
    let name: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].iter().flat_map(|r| r.to_le_bytes()).collect();
    name == TRANSLATOR
}

/// Takes nearly all free memory, in pages as large as there are, writes it and gives it back.
///
/// # Errors
/// `/proc/meminfo` cannot be read, or the mapping is refused, or there is no process for it.
pub fn write_free_memory() -> io::Result<()> {
    let free = free_kib(&fs::read_to_string("/proc/meminfo")?)
        .ok_or_else(|| io::Error::other("no `MemFree` in /proc/meminfo"))?;
    let length = (free.saturating_sub(SPARED_KIB) << 10) as usize / PAGE * PAGE;
    write_in_a_child(length)
}

/// Takes `length` bytes, writes them and gives them back, in a process of its own: a program that is started takes over the peak of memory of the
/// one that starts it, so that a harness which had done this itself would find its own peak in every `ru_maxrss`.
fn write_in_a_child(length: usize) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    // SAFETY: the child makes only calls that are allowed after a fork of a process with threads, and ends by `_exit`.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = i32::from(!write(length));
            // SAFETY: ends this process; nothing of the harness's is run.
            unsafe { libc::_exit(code) }
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` outlives the call; the child is ours.
            while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            if status == 0 {
                Ok(())
            } else {
                Err(io::Error::other(format!("the child that writes it ended with {status:#x}")))
            }
        }
    }
}

/// Whether there was such a mapping to write. Allocates nothing: the process is a fork of one with threads.
fn write(length: usize) -> bool {
    // SAFETY: a new anonymous mapping, where the kernel likes.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the mapping is ours and `length` long. Advice that is not taken makes small pages, which are written as well.
    unsafe { libc::madvise(memory, length, libc::MADV_HUGEPAGE) };
    for offset in (0..length).step_by(PAGE) {
        // SAFETY: `offset` is below the mapping's length. The kernel clears the page on its first write, which is what is wanted.
        unsafe { memory.cast::<u8>().add(offset).write_volatile(1) };
    }
    true
}

fn free_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|l| l.starts_with("MemFree:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_not_in_our_own_peak() {
        let peak = || {
            fs::read_to_string("/proc/self/status")
                .unwrap()
                .lines()
                .find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok())
        };
        write_in_a_child(512 << 20).unwrap();
        assert!(peak().unwrap() < 256 << 10, "{peak:?} KiB", peak = peak());
    }

    #[test]
    fn free_memory_is_what_the_kernel_says() {
        let text = "MemTotal:        2021440 kB\nMemFree:         1978764 kB\nMemAvailable:    1905840 kB\n";
        assert_eq!(free_kib(text), Some(1_978_764));
        assert_eq!(free_kib("MemTotal: 5 kB\n"), None);
        assert_eq!(free_kib("MemFree: lots\n"), None);
    }
}
