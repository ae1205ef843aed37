//! A run of a test in a process of its own, in which one call on a file fails, or at which it is killed: the N-th of all its
//! threads together. A tracer would count the calls of each thread by themselves, and leave out those of the threads that
//! make few.
//!
//! This defines the symbols in the binary of the tests, as `buffer::shims` does in the program: the linker gives them
//! precedence over libc's. What only that of `shims` calls is here by the name it has there.
#![allow(unsafe_code)]

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{env, fs, thread};

use libc::{c_char, c_int, c_long, c_uint, c_void, iovec, mode_t, off64_t, size_t};

/// What tells the process what is to happen to it: the folder, what and when.
const FOLDER: &str = "TELEMETRY_TEST_FOLDER";
const AIM: &str = "TELEMETRY_TEST_AIM";
/// Begins the line by which it tells that this happened.
const HIT: &str = "telemetry-test-hit ";
/// No run takes long: one that does waits for what never comes, and ends so.
const PATIENCE: Duration = Duration::from_secs(20);
const STUCK: c_int = 99;

/// Which calls count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What changes files, or makes a change durable.
    Change,
    Read,
    /// Whether it is there, and opening it.
    Look,
}

/// What happens at one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Killed,
    /// EIO.
    Failed,
}

const KINDS: [Kind; 3] = [Kind::Change, Kind::Read, Kind::Look];
const FATES: [Fate; 2] = [Fate::Killed, Fate::Failed];

/// What a run in a process of its own came to.
pub struct Ended {
    /// On standard output.
    pub said: String,
    /// The call at which it happened; `None` when it made fewer.
    pub hit: Option<String>,
}

/// Runs a test of this binary, by its whole name, again: it has to ask [`folder`].
pub fn run(test: &str, folder: &Path, (kind, fate): (Kind, Fate), call: u64) -> Ended {
    let aim = format!("{} {} {call}", fate as usize, kind as usize);
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(FOLDER, folder.canonicalize().unwrap())
        .env(AIM, aim)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let wrong = String::from_utf8_lossy(&output.stderr);
    let hit = wrong.lines().find_map(|line| line.strip_prefix(HIT)).map(str::to_owned);
    let status = output.status;
    assert_ne!(status.code(), Some(STUCK), "{hit:?}: it neither went on nor ended");
    let killed = status.signal() == Some(libc::SIGKILL);
    assert_eq!(killed, hit.is_some() && fate == Fate::Killed, "{status}: {said}{wrong}");
    assert!(!said.contains("running 0 tests"), "{test}");
    // sled may tell no one of it, and whoever waits for that waits for ever: so the process ends by itself, at once.
    let of_sled = |hit: &str| {
        let refused = ["pwritev64 ", "fdatasync "].iter().any(|call| hit.starts_with(call));
        refused && hit.ends_with("/db")
    };
    let must_end = fate == Fate::Failed && hit.as_deref().is_some_and(of_sled);
    assert!(!must_end || status.code() == Some(1), "{hit:?}: {status}: {said}{wrong}");
    Ended { said, hit }
}

/// In the process that [`run`] made: the folder whose files it is about. From here on calls count.
pub fn folder() -> Option<PathBuf> {
    let folder = PathBuf::from(env::var_os(FOLDER)?);
    let aim = env::var(AIM).unwrap();
    let mut aim = aim.split(' ').map(|number| number.parse::<u64>().unwrap());
    let mut next = || aim.next().unwrap();
    let fate = FATES[next() as usize];
    let kind = KINDS[next() as usize];
    let left = AtomicU64::new(next());
    thread::spawn(|| {
        thread::sleep(PATIENCE);
        exit(STUCK);
    });
    assert!(TARGET.set(Target { folder: folder.clone(), fate, kind, left }).is_ok(), "asked twice");
    Some(folder)
}

struct Target {
    folder: PathBuf,
    fate: Fate,
    kind: Kind,
    left: AtomicU64,
}

static TARGET: OnceLock<Target> = OnceLock::new();

/// What the calls are about.
#[derive(Clone, Copy)]
enum File {
    Open(c_int),
    Named(*const c_char),
    In(c_int, *const c_char),
}

impl File {
    fn path(self) -> Option<PathBuf> {
        let open = |fd: c_int| fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        // SAFETY: the names that the callers of libc's functions give end with a zero.
        let named =
            |name| PathBuf::from(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()));
        match self {
            File::Open(fd) => open(fd),
            File::Named(name) | File::In(libc::AT_FDCWD, name) => Some(named(name)),
            File::In(folder, name) => Some(open(folder)?.join(named(name))),
        }
    }
}

/// Goes on with the system call, unless it is the one that fails.
fn make(kind: Kind, name: &str, file: File, call: impl FnOnce() -> c_long) -> c_long {
    if is_hit(kind, name, file) {
        // SAFETY: this thread's own.
        unsafe { *libc::__errno_location() = libc::EIO };
        return -1;
    }
    call()
}

fn is_hit(kind: Kind, name: &str, file: File) -> bool {
    let Some(target) = TARGET.get().filter(|target| target.kind == kind) else { return false };
    let Some(path) = file.path().filter(|path| path.starts_with(&target.folder)) else {
        return false;
    };
    if target.left.fetch_sub(1, Ordering::SeqCst) != 1 {
        return false;
    }
    let line = format!("\n{HIT}{name} {}\n", path.display());
    // SAFETY: a plain system call on bytes that are there; `print` would come back here.
    unsafe { libc::syscall(libc::SYS_write, 2, line.as_ptr(), line.len()) };
    if target.fate == Fate::Killed {
        // SAFETY: ends this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            thread::park();
        }
    }
    true
}

/// Each takes the place of libc's function of this name, and is the system call of it.
macro_rules! calls {
    ($($kind:ident $name:ident($($argument:ident: $type:ty),*) -> $result:ty, $file:expr, $number:ident($($given:expr),*);)*) => {
        $(
            /// # Safety
            /// As the system call.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> $result {
                // SAFETY: the caller's promise, handed on.
                let call = || unsafe { libc::syscall(libc::$number, $($given),*) };
                make(Kind::$kind, stringify!($name), $file, call) as $result
            }
        )*
    };
}

calls! {
    Change fsync(fd: c_int) -> c_int, File::Open(fd), SYS_fsync(fd);
    Change fdatasync(fd: c_int) -> c_int, File::Open(fd), SYS_fdatasync(fd);
    Change ftruncate64(fd: c_int, bytes: off64_t) -> c_int, File::Open(fd), SYS_ftruncate(fd, bytes);
    Change write(fd: c_int, from: *const c_void, bytes: size_t) -> isize,
        File::Open(fd), SYS_write(fd, from, bytes);
    Change pwritev64(fd: c_int, from: *const iovec, pieces: c_int, offset: off64_t) -> isize,
        File::Open(fd), SYS_pwritev(fd, from, pieces, offset, 0);
    Change copy_file_range(
        from: c_int, from_offset: *mut off64_t, to: c_int, to_offset: *mut off64_t,
        bytes: size_t, flags: c_uint
    ) -> isize, File::Open(to), SYS_copy_file_range(from, from_offset, to, to_offset, bytes, flags);
    Change rename(from: *const c_char, to: *const c_char) -> c_int,
        File::Named(from), SYS_renameat2(libc::AT_FDCWD, from, libc::AT_FDCWD, to, 0);
    Change unlink(name: *const c_char) -> c_int,
        File::Named(name), SYS_unlinkat(libc::AT_FDCWD, name, 0);
    Change rmdir(name: *const c_char) -> c_int,
        File::Named(name), SYS_unlinkat(libc::AT_FDCWD, name, libc::AT_REMOVEDIR);
    Change unlinkat(folder: c_int, name: *const c_char, flags: c_int) -> c_int,
        File::In(folder, name), SYS_unlinkat(folder, name, flags);
    Change mkdir(name: *const c_char, mode: mode_t) -> c_int,
        File::Named(name), SYS_mkdirat(libc::AT_FDCWD, name, mode);
    Read read(fd: c_int, to: *mut c_void, bytes: size_t) -> isize,
        File::Open(fd), SYS_read(fd, to, bytes);
    Read preadv64(fd: c_int, to: *const iovec, pieces: c_int, offset: off64_t) -> isize,
        File::Open(fd), SYS_preadv(fd, to, pieces, offset, 0);
    Look statx(
        folder: c_int, name: *const c_char, flags: c_int, mask: c_uint, answer: *mut libc::statx
    ) -> c_int, File::In(folder, name), SYS_statx(folder, name, flags, mask, answer);
    Look open64(name: *const c_char, flags: c_int, mode: mode_t) -> c_int,
        File::Named(name), SYS_openat(libc::AT_FDCWD, name, flags, mode);
}

/// That the linker did as told: nothing else promises it.
#[test]
fn each_kind_of_call_is_seen() {
    const NAME: &str = "each_kind_of_call_is_seen";
    if let Some(folder) = folder() {
        let made = || -> io::Result<Vec<u8>> {
            let path = folder.join("file");
            fs::write(&path, "text")?;
            fs::metadata(&path)?;
            fs::read(&path)
        };
        println!("\nmade {}", made().is_ok());
        return;
    }
    let test = format!("{}::{NAME}", module_path!().split_once("::").unwrap().1);
    for (fate, kind) in FATES.into_iter().flat_map(|fate| KINDS.map(|kind| (fate, kind))) {
        let seen = |call| {
            let folder = tempfile::tempdir().unwrap();
            run(&test, folder.path(), (kind, fate), call)
        };
        let first = seen(1);
        assert!(first.hit.is_some() && !first.said.contains("made true"), "{fate:?} {kind:?}");
        let never = seen(100);
        assert!(never.hit.is_none() && never.said.contains("made true"), "{fate:?} {kind:?}");
    }
}
