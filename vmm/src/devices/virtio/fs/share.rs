//! The shared directory as a FUSE file system: the passthrough file system, with limits on what a hostile guest may ask of it.
//!
//! Owns: which options are agreed on, which open flags, names, nodes and attributes pass. Does not own: doing the operations
//! (`fuse-backend-rs`, whose inodes are O_PATH descriptors: nothing is looked up by a path of more than one component, no
//! symbolic link is followed, and only regular files and directories are opened).
//!
//! Caching: the guest trusts names and attributes for one second and drops a file's pages when its time or size changed, so
//! what the host writes (`podman cp`, a new /etc/hosts, a new container) is seen within a second, or at the next open if that
//! is earlier. Writes go to the host at once. OPEN is not skipped (`no_open`): it is where changes are noticed.
//!
//! Locks are not offered to the host: flock and fcntl locks hold among the guest's processes.

use std::{
    collections::HashMap,
    ffi::CStr,
    fs::OpenOptions as HostOptions,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuse_backend_rs::{
    abi::fuse_abi::{ATTR_SUBMOUNT, CreateIn, stat64, statvfs64},
    api::{
        filesystem::{
            Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
            SetattrValid, ZeroCopyReader, ZeroCopyWriter,
        },
        validate_path_component,
    },
    passthrough::{CachePolicy, Config, PassthroughFs},
};

/// How long the guest trusts a name or an attribute.
const TRUST: Duration = Duration::from_secs(1);
/// XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux: no attribute needs a larger buffer.
const MAX_XATTR: u32 = 65536;
/// Flags of an open file that mean something to the host's file. O_DIRECT is not among them, because the guest's buffers are not
/// aligned as the host's file system wants them.
const FILE_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_DSYNC | libc::O_SYNC | libc::O_NOATIME;
/// Flags that act when a file is opened. O_PATH and O_TMPFILE must never pass: the first would follow a symbolic link.
const OPEN_FLAGS: i32 = FILE_FLAGS | libc::O_TRUNC | libc::O_EXCL;

type Inode = u64;
type Handle = u64;

/// Locks that handles share: enough that two of the few threads seldom meet at one without need.
const LOCKS: usize = 16;

/// The passthrough file system behind its limits.
pub(super) struct Share {
    inner: PassthroughFs<()>,
    /// A handle's by its number. The file system behind sets the descriptor's O_APPEND as a request has it and then acts, which
    /// is not one step: pages written back, which want it clear, go alone, reads and appends with it set beside each other.
    appends: [RwLock<()>; LOCKS],
    /// Held by who writes back all of a host's file system.
    syncs: Mutex<()>,
    /// The files whose pages the guest may still hold, as they were when it opened them last.
    opened: Mutex<HashMap<Inode, Version>>,
    /// Set by the first request of a mount.
    mounted: Arc<AtomicBool>,
}

/// What changes with a file's content.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    changed: (i64, i64),
    size: i64,
}

/// A panic aborts the process, so no lock is ever poisoned; this spares an `unwrap`.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Share {
    /// `root` is an absolute path without symbolic links.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn new(root: &str, mounted: Arc<AtomicBool>) -> io::Result<Self> {
        let config = Config {
            root_dir: root.to_owned(),
            cache_policy: CachePolicy::Auto,
            entry_timeout: TRUST,
            attr_timeout: TRUST,
            writeback: false,
            xattr: true,
            no_open: false,
            killpriv_v2: true,
            allow_direct_io: false,
            ..Config::default()
        };
        let inner = PassthroughFs::new(config)?;
        Ok(Self {
            inner,
            appends: Default::default(),
            syncs: Mutex::new(()),
            opened: Mutex::default(),
            mounted,
        })
    }

    /// Whether the pages that the guest has of a file, if any, are those on the host. A file that changed just now is not
    /// remembered: a second change within the clock's tick would leave no trace.
    fn unchanged(&self, inode: Inode, stat: &stat64) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let settled =
            u64::try_from(stat.st_ctime).is_ok_and(|at| now.as_secs() > at.saturating_add(TRUST.as_secs()));
        let version = Version { changed: (stat.st_ctime, stat.st_ctime_nsec), size: stat.st_size };
        let mut opened = lock(&self.opened);
        let before = if settled { opened.insert(inode, version) } else { opened.remove(&inode) };
        before == Some(version)
    }

    /// Does something over a handle whose file has these flags. `delayed` are pages that the guest writes back: they belong at
    /// their offset, whatever handle of the file they travel over, and Linux puts such at its end where O_APPEND is set.
    fn with_flags<T>(
        &self,
        handle: Handle,
        file_flags: u32,
        delayed: bool,
        act: impl FnOnce(u32) -> io::Result<T>,
    ) -> io::Result<T> {
        let passed = flags(file_flags, if delayed { FILE_FLAGS & !libc::O_APPEND } else { FILE_FLAGS })?;
        let appends = &self.appends[handle as usize % LOCKS];
        let alone = delayed.then(|| appends.write());
        let beside = (passed.cast_signed() & libc::O_APPEND != 0).then(|| appends.read());
        let done = act(passed);
        drop((alone, beside));
        done
    }

    /// SYNCFS, which the server does not know: the file system of a directory goes to the disk. It has other tenants' files too, so
    /// one at a time, whatever the guest asks for.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn sync(&self, directory: Inode) -> io::Result<()> {
        let device = self.device_of(&Context::default(), directory)?;
        let path = self.inner.readlinkat_proc_file(directory)?;
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let opened = HostOptions::new().read(true).custom_flags(flags).open(path)?;
        // Something else may be mounted at the path, or moved there, by now.
        if opened.metadata()?.dev() != device {
            return Err(refused(libc::ESTALE));
        }
        let _one_at_a_time = lock(&self.syncs);
        // SAFETY: the descriptor is open, and the call touches no memory.
        if unsafe { libc::syncfs(opened.as_raw_fd()) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn device_of(&self, ctx: &Context, directory: Inode) -> io::Result<libc::dev_t> {
        self.inner.getattr(ctx, directory, None).map(|(stat, _)| stat.st_dev)
    }
}

fn refused(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn flags(requested: u32, allowed: i32) -> io::Result<u32> {
    let flags = requested.cast_signed() & allowed;
    // The fourth access mode asks a device driver for a descriptor for ioctls only.
    if flags & libc::O_ACCMODE == libc::O_ACCMODE {
        Err(refused(libc::EINVAL))
    } else {
        Ok(flags.cast_unsigned())
    }
}

/// Attributes by which the host's kernel decides must not come from the guest. File capabilities may: the guest can make a file
/// set-uid as well.
fn writable_attribute(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    let of_the_host = name.starts_with(b"trusted.") || name.starts_with(b"security.");
    if of_the_host && name != b"security.capability" { Err(refused(libc::EOPNOTSUPP)) } else { Ok(()) }
}

/// A directory on another device than its parent is a mount point: the guest mounts it as a file system of its own, so that
/// inode numbers of two host file systems do not meet under one device number.
fn mark_submount(entry: &mut Entry, parent: libc::dev_t) {
    if entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR && entry.attr.st_dev != parent {
        entry.attr_flags |= ATTR_SUBMOUNT;
    }
}

impl FileSystem for Share {
    type Inode = Inode;
    type Handle = Handle;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.mounted.store(true, Ordering::SeqCst);
        let ours = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::SUBMOUNTS
            | FsOptions::INIT_EXT;
        // ASYNC_DIO is not offered: Linux then sends the requests of one large direct write in parallel, also of one with O_APPEND,
        // whose parts would come to the file's end in any order.
        let never = FsOptions::PERFILE_DAX | FsOptions::WRITEBACK_CACHE | FsOptions::ASYNC_DIO;
        Ok((self.inner.init(capable - never)? | ours) - never)
    }

    fn destroy(&self) {
        lock(&self.opened).clear();
        self.inner.destroy();
    }

    fn lookup(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        // `.` and `..` are for NFS servers in the guest, which are not offered; the guest's kernel resolves them itself.
        validate_path_component(name)?;
        let mut entry = self.inner.lookup(ctx, parent, name)?;
        if entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR {
            match self.device_of(ctx, parent) {
                Ok(device) => mark_submount(&mut entry, device),
                Err(error) => {
                    self.inner.forget(ctx, entry.inode, 1);
                    return Err(error);
                }
            }
        }
        Ok(entry)
    }

    fn forget(&self, ctx: &Context, inode: Inode, count: u64) {
        lock(&self.opened).remove(&inode);
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(Inode, u64)>) {
        let mut opened = lock(&self.opened);
        for (inode, _) in &requests {
            opened.remove(inode);
        }
        drop(opened);
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: &Context, inode: Inode, handle: Option<Handle>) -> io::Result<(stat64, Duration)> {
        self.inner.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: Inode,
        attr: stat64,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: &Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: Inode, name: &CStr) -> io::Result<Entry> {
        self.inner.symlink(ctx, target, parent, name)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        match mode & libc::S_IFMT {
            // 0 is a regular file.
            0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => {
                self.inner.mknod(ctx, parent, name, mode, 0, umask)
            }
            // 0:0 is overlayfs's whiteout and opens no device.
            libc::S_IFCHR if rdev == 0 => self.inner.mknod(ctx, parent, name, mode, rdev, umask),
            // A device node in a shared directory would give the host's devices to whoever can open it there.
            _ => Err(refused(libc::EPERM)),
        }
    }

    fn mkdir(&self, ctx: &Context, parent: Inode, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        self.inner.mkdir(ctx, parent, name, mode, umask)
    }

    fn unlink(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        old_parent: Inode,
        old_name: &CStr,
        new_parent: Inode,
        new_name: &CStr,
        how: u32,
    ) -> io::Result<()> {
        self.inner.rename(ctx, old_parent, old_name, new_parent, new_name, how)
    }

    fn link(&self, ctx: &Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry> {
        self.inner.link(ctx, inode, parent, name)
    }

    fn open(
        &self,
        ctx: &Context,
        inode: Inode,
        requested: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions, Option<u32>)> {
        let allowed = flags(requested, OPEN_FLAGS & !libc::O_EXCL)?;
        let (handle, mut options, passthrough) = self.inner.open(ctx, inode, allowed, fuse_flags)?;
        let now = self.inner.getattr(ctx, inode, handle);
        options.set(OpenOptions::KEEP_CACHE, now.is_ok_and(|(stat, _)| self.unchanged(inode, &stat)));
        Ok((handle, options, passthrough))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions, Option<u32>)> {
        args.flags = flags(args.flags, OPEN_FLAGS)?;
        self.inner.create(ctx, parent, name, args)
    }

    fn read(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        file_flags: u32,
    ) -> io::Result<usize> {
        self.with_flags(handle, file_flags, false, |passed| {
            self.inner.read(ctx, inode, handle, to, size, offset, lock_owner, passed)
        })
    }

    /// Appends go to the file's end as the host's kernel sees it in that moment, by the descriptor's O_APPEND: another pod may
    /// write to the same file or empty it, and the guest's offset is then wrong.
    fn write(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        file_flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.with_flags(handle, file_flags, delayed, |passed| {
            self.inner.write(ctx, inode, handle, from, size, offset, lock_owner, delayed, passed, fuse_flags)
        })
    }

    fn flush(&self, ctx: &Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: Inode, data_only: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsync(ctx, inode, data_only, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.inner.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: Inode,
        file_flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner.release(ctx, inode, file_flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: &Context, inode: Inode) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(&self, ctx: &Context, inode: Inode, name: &CStr, value: &[u8], how: u32) -> io::Result<()> {
        writable_attribute(name)?;
        self.inner.setxattr(ctx, inode, name, value, how)
    }

    fn getxattr(&self, ctx: &Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.inner.getxattr(ctx, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size.min(MAX_XATTR))
    }

    fn removexattr(&self, ctx: &Context, inode: Inode, name: &CStr) -> io::Result<()> {
        writable_attribute(name)?;
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: Inode,
        requested: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.inner.opendir(ctx, inode, flags(requested, FILE_FLAGS)?)
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.inner.readdir(ctx, inode, handle, size, offset, add)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let parent = self.device_of(ctx, inode)?;
        self.inner.readdirplus(ctx, inode, handle, size, offset, &mut |name, mut entry| {
            mark_submount(&mut entry, parent);
            add(name, entry)
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: Inode, data_only: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, data_only, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: Inode, file_flags: u32, handle: Handle) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, file_flags, handle)
    }

    fn access(&self, ctx: &Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
