//! The machine's kernel: Debian's own, so that there is nothing to build. Kept in ${COFFER_CACHE:-~/.cache/coffer}/rig.
//!
//! Owns: getting the package, the kernel as an ELF file, the initramfs. Does not own: how they are started.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use cpio::{NewcBuilder, newc};
use thiserror::Error;

use crate::modules;

/// PID 1 of the machine until the host's files are there, and the part after that.
const INIT: &str = include_str!("../guest/init");
const STAGE2: &str = include_str!("../guest/stage2");
const BUSYBOX: &str = "/bin/busybox";
const PACKAGES: &str = r"^linux-image-6\.12\..*\+deb12-amd64-unsigned$";

/// What goes wrong between apt and a kernel that can be started.
#[derive(Debug, Error)]
pub(crate) enum KernelError {
    #[error("{what} {path}: {source}")]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{program}: {words}; tests/rig/rig installs what is needed, as root on Debian 12")]
    Tool { program: String, words: String },
    #[error("apt knows no package {PACKAGES}: the machine's kernel comes from Debian 12's security updates")]
    NoPackage,
    #[error("{0}: not a kernel that this can unpack: {1}")]
    Format(PathBuf, &'static str),
}

/// Files for QEMU, and the modules that did not go into the initramfs.
#[derive(Debug)]
pub(crate) struct Stock {
    /// ELF with a PVH entry: QEMU starts it without a boot loader, and nothing is decompressed by an emulated CPU.
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// `/lib/modules/VERSION`, elsewhere.
    pub(crate) modules: PathBuf,
}

fn at<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> KernelError + 'a {
    move |source| KernelError::File { what, path: path.to_owned(), source }
}

/// The cached kernel; the first time on a machine it is downloaded, which takes some seconds.
pub(crate) fn ready() -> Result<Stock, KernelError> {
    let cache = cache();
    fs::create_dir_all(&cache).map_err(at("make", &cache))?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(at("make", &lock_path))?;
    lock.lock().map_err(at("lock", &lock_path))?;
    let package = match newest(&cache)? {
        Some(package) => package,
        None => fetch(&cache)?,
    };
    let modules = only_entry(&package.join("lib/modules"))?;
    let initramfs = package.join(format!("initramfs-{:016x}", fnv1a(&recipe(&package)?)));
    if !initramfs.exists() {
        let bytes = pack(&modules)?;
        put(&initramfs, &bytes)?;
    }
    Ok(Stock { kernel: package.join("vmlinux"), initramfs, modules })
}

fn cache() -> PathBuf {
    let base = std::env::var_os("COFFER_CACHE").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or("/root".into())).join(".cache/coffer");
    base.unwrap_or_else(home).join("rig")
}

/// Everything that the initramfs is made of but is not already in the package's name.
fn recipe(package: &Path) -> Result<String, KernelError> {
    let busybox =
        fs::metadata(BUSYBOX).map_err(at("find (apt-get install busybox-static)", Path::new(BUSYBOX)))?;
    Ok(format!("{}{INIT}{STAGE2}{:?}{}", package.display(), modules::WANTED, busybox.len()))
}

/// A name for a recipe; not a defence against anybody.
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, KernelError> {
    let read = at("read", directory);
    fs::read_dir(directory).map_err(&read)?.map(|e| e.map(|e| e.path()).map_err(&read)).collect()
}

fn only_entry(directory: &Path) -> Result<PathBuf, KernelError> {
    entries(directory)?
        .pop()
        .ok_or_else(|| at("read", directory)(io::Error::other("it is empty: remove it, it is made again")))
}

/// The numbers in a text, to compare versions.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn newest(cache: &Path) -> Result<Option<PathBuf>, KernelError> {
    let unpacked = entries(cache)?.into_iter().filter(|p| p.join("vmlinux").exists());
    Ok(unpacked.max_by_key(|p| numbers(&p.to_string_lossy())))
}

fn output(command: &mut Command) -> Result<Vec<u8>, KernelError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let tool = |words: String| KernelError::Tool { program: program.clone(), words };
    let output = command.stdin(Stdio::null()).output().map_err(|e| tool(e.to_string()))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(tool(format!("{}: {words}", output.status)))
    }
}

fn search() -> Result<Option<String>, KernelError> {
    let text = output(Command::new("apt-cache").args(["search", "--names-only", PACKAGES]))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let names = text.lines().filter_map(|l| l.split_whitespace().next());
    Ok(names
        .filter(|n| !n.contains("-rt-") && !n.contains("-cloud-"))
        .max_by_key(|n| numbers(n))
        .map(str::to_owned))
}

fn fetch(cache: &Path) -> Result<PathBuf, KernelError> {
    let package = match search()? {
        Some(package) => package,
        None => {
            output(Command::new("apt-get").args(["-qq", "update"]))?;
            search()?.ok_or(KernelError::NoPackage)?
        }
    };
    eprintln!("rig: getting {package} for the emulated machine, once");
    let work = cache.join("work");
    let _ = fs::remove_dir_all(&work); // of one that was interrupted; the lock is ours
    fs::create_dir(&work).map_err(at("make", &work))?;
    // apt's own user cannot write below a home directory.
    let download = ["-qq", "-o", "APT::Sandbox::User=root", "download", &package];
    output(Command::new("apt-get").args(download).current_dir(&work))?;
    let deb = only_entry(&work)?;
    let root = work.join("root");
    output(Command::new("dpkg-deb").arg("-x").args([&deb, &root]))?;
    let modules = only_entry(&root.join("lib/modules"))?;
    let version = modules.file_name().unwrap_or_default();
    output(Command::new("/sbin/depmod").arg("-b").arg(&root).arg(version))?;
    let compressed = root
        .join("boot")
        .join(Path::new("vmlinuz-").with_file_name(format!("vmlinuz-{}", version.to_string_lossy())));
    let image = fs::read(&compressed).map_err(at("read", &compressed))?;
    let payload = payload(&image).map_err(|why| KernelError::Format(compressed.clone(), why))?;
    let elf =
        unpack(payload).map_err(|e| e.unwrap_or(KernelError::Format(compressed, "neither zstd nor xz")))?;
    put(&root.join("vmlinux"), &elf)?;
    fs::remove_dir_all(root.join("boot")).map_err(at("remove", &root))?;
    let _ = fs::remove_dir_all(root.join("usr"));
    let name = deb.file_stem().unwrap_or_default().to_string_lossy().replace("%3a", ":");
    let target = cache.join(name);
    fs::rename(&root, &target).map_err(at("move to", &target))?;
    fs::remove_dir_all(&work).map_err(at("remove", &work))?;
    Ok(target)
}

/// Writes a file that is never seen half done.
fn put(path: &Path, bytes: &[u8]) -> Result<(), KernelError> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, bytes).map_err(at("write", &fresh))?;
    fs::rename(&fresh, path).map_err(at("move to", path))
}

/// The compressed kernel in a bzImage (Linux, Documentation/arch/x86/boot.rst: `setup_sects`, `payload_offset`,
/// `payload_length`), without the size in its last 4 bytes.
fn payload(image: &[u8]) -> Result<&[u8], &'static str> {
    let word = |at: usize| {
        image.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes).ok_or("it is too short")
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("it has no boot header");
    }
    let sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let begin = (sectors + 1) * 512 + word(0x248)? as usize;
    let length = (word(0x24c)? as usize).checked_sub(4).ok_or("its payload is empty")?;
    image.get(begin..begin + length).ok_or("its payload ends after the file")
}

/// Decompresses by the program for its first bytes. The error is empty when there is no such program.
fn unpack(bytes: &[u8]) -> Result<Vec<u8>, Option<KernelError>> {
    let program = match bytes {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "xz",
        _ => return Err(None),
    };
    let tool = |e: io::Error| Some(KernelError::Tool { program: program.to_owned(), words: e.to_string() });
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(tool)?;
    let Some(mut stdin) = child.stdin.take() else { return Err(None) };
    let output = std::thread::scope(|scope| {
        // A failure to write shows in the program's exit status.
        scope.spawn(move || drop(stdin.write_all(bytes)));
        child.wait_with_output()
    });
    let output = output.map_err(tool)?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(tool(io::Error::other(output.status.to_string())))
    }
}

/// The initramfs: busybox, init, and the modules under numbers that give the loading order.
fn pack(modules: &Path) -> Result<Vec<u8>, KernelError> {
    let dep = modules.join("modules.dep");
    let text = fs::read_to_string(&dep).map_err(at("read", &dep))?;
    let order = modules::order(&text, &modules::WANTED);
    let mut archive = Vec::new();
    let mut inode = 0;
    let mut add = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        inode += 1;
        let header = NewcBuilder::new(name).ino(inode).mode(mode).nlink(1);
        let header = header.rdev_major(device.0).rdev_minor(device.1);
        // A module or busybox of 4 GiB does not exist.
        let mut entry = header.write(&mut archive, data.len() as u32);
        entry
            .write_all(data)
            .and_then(|()| entry.finish().map(drop))
            .map_err(at("pack", Path::new("initramfs")))
    };
    for directory in ["bin", "dev", "host", "modules", "new", "proc", "state", "upper"] {
        add(directory, 0o040_755, (0, 0), &[])?;
    }
    add("dev/console", 0o020_600, (5, 1), &[])?;
    add("dev/null", 0o020_666, (1, 3), &[])?;
    add("init", 0o100_755, (0, 0), INIT.as_bytes())?;
    add("stage2", 0o100_755, (0, 0), STAGE2.as_bytes())?;
    add("bin/busybox", 0o100_755, (0, 0), &fs::read(BUSYBOX).map_err(at("read", Path::new(BUSYBOX)))?)?;
    for (n, file) in order.iter().enumerate() {
        let path = modules.join(file);
        let bytes = fs::read(&path).map_err(at("read", &path))?;
        let bytes = if file.ends_with(".ko") {
            bytes
        } else {
            unpack(&bytes).map_err(|e| e.unwrap_or(KernelError::Format(path, "neither zstd nor xz")))?
        };
        let base = file.rsplit('/').next().unwrap_or(file).split(".ko").next().unwrap_or(file);
        add(&format!("modules/{n:03}-{base}.ko"), 0o100_644, (0, 0), &bytes)?;
    }
    newc::trailer(&mut archive).map_err(at("pack", Path::new("initramfs")))?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&9_u32.to_le_bytes());
        image[1040..1049].copy_from_slice(b"hello\x05\0\0\0");
        image
    }

    #[test]
    fn the_payload_is_found_and_never_beyond_the_file() {
        assert_eq!(payload(&image()), Ok(&b"hello"[..]));
        for length in 0..0x250 {
            assert!(payload(&image()[..length]).is_err(), "{length}");
        }
        assert!(payload(&image()[..1044]).is_err());
        let mut wrong = image();
        wrong[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&wrong).is_err());
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(numbers("linux-image-6.12.117+deb12") > numbers("linux-image-6.12.99+deb12"));
    }
}
