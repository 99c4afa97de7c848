//! Libraries that will not do, more than one of them, and memory that may not be locked: each in a process of its own.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use kvferry_core::PoolId;
use kvferry_transport::conformance::{absent, block_planes};
use kvferry_transport::{Options, Pool, PoolOptions, Provider, Transport};
use kvferry_ucx::UcxProvider;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// Says what the other process does.
const ROLE: &str = "KVFERRY_UCX_TEST_ROLE";
const LIBRARY: &str = "KVFERRY_UCX_LIBRARY";
/// A device of a host that has some.
const EFA: &str = "rdmap0s6:1";
const POOL_BYTES: u64 = 4 << 20;

/// A folder of this test's own.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kvferry-library-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// Builds the pretender here; none without a C compiler.
    fn pretender(&self, version: (u32, u32), changes: &[&str]) -> Option<PathBuf> {
        let library = self.0.join("libucp.so.0");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pretender.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-Wl,-soname,libucp.so.0", "-o"]).arg(&library).arg(source);
        compiler.args([format!("-DMAJOR={}", version.0), format!("-DMINOR={}", version.1)]).args(changes);
        let output = match compiler.output() {
            Ok(output) => output,
            Err(error) => {
                absent("c++", &format!("a library that is not UCX cannot be built: cc does not start ({error})"));
                return None;
            }
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(library)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

/// What another process says, in which `library` is the one that is asked for.
fn ask(role: &str, library: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "other_process", "--nocapture"]).env(ROLE, role).env(LIBRARY, library);
    // UCX 1.13's hooks and AddressSanitizer's do not go together, and nothing here needs them.
    command.env("UCX_MEM_MMAP_HOOK_MODE", "none");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = text.lines().filter_map(|line| line.strip_prefix("@ ")).collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// What the other process runs: this test, started again with a role.
#[test]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    println!();
    match role.split(' ').collect::<Vec<_>>()[..] {
        ["why"] => println!("@ {}", UcxProvider::unavailable().unwrap_or_else(|| "usable".to_owned())),
        ["name"] => println!("@ {}", name()),
        ["after", other] => {
            load(other);
            println!("@ {}", UcxProvider::unavailable().unwrap_or_else(name));
        }
        ["before", other] => {
            println!("@ {}", name());
            load(other);
            println!("@ {}", name());
        }
        ["lock", limit, capability] => lock(limit.parse().unwrap(), capability == "capable"),
        _ => panic!("{role:?}"),
    }
}

/// The library, as an opened device names it.
fn name() -> String {
    open(&UcxProvider::new().only("lo"), "lo").unwrap().info().library.clone().unwrap()
}

fn open(provider: &UcxProvider, device: &str) -> Result<Box<dyn Transport>, String> {
    let device = provider.named(device).ok_or("no such device")?;
    provider.open(&device, &Options::default()).map_err(|error| error.to_string())
}

fn load(library: &str) {
    let name = CString::new(library).unwrap();
    // SAFETY: what is loaded is a build of UCX, or the pretender, which initialises nothing.
    let loaded = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!loaded.is_null(), "{library} cannot be loaded");
}

/// Says how opening a device and registering a pool with it end under a limit of locked memory.
fn lock(limit: u64, is_capable: bool) {
    let maximum = getrlimit(Resource::Memlock).maximum;
    if maximum.is_some_and(|maximum| maximum < limit) {
        return println!("@ cannot be tried: the limit is {maximum:?} already");
    }
    setrlimit(Resource::Memlock, Rlimit { current: Some(limit), maximum }).unwrap();
    let mut sets = capabilities(None).unwrap();
    if is_capable {
        if !sets.effective.contains(CapabilitySet::IPC_LOCK) {
            return println!("@ cannot be tried: there is no such capability");
        }
    } else {
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, sets).unwrap();
    }
    let mut transport = match open(&UcxProvider::new().only(EFA), EFA) {
        Ok(transport) => transport,
        Err(error) => return println!("@ opening: {error}"),
    };
    let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
    let pool = Pool::allocate_with(PoolId(1), block_planes(1, 1, POOL_BYTES), "library", &options).unwrap();
    match transport.bind(&pool) {
        Ok(_) => println!("@ bound"),
        Err(error) => println!("@ binding: {error}"),
    }
}

fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn versions_that_will_not_do_are_refused_with_what_is_needed() {
    for (version, found) in [((1, 9), "1.9.0"), ((1, 12), "1.12.0"), ((2, 0), "2.0.0")] {
        let folder = Folder::new();
        let Some(library) = folder.pretender(version, &[]) else { return };
        assert_says(&ask("why", text(&library)), &[text(&library), found, "1.13.0 or later"]);
    }
    let folder = Folder::new();
    let Some(library) = folder.pretender((1, 13), &[]) else { return };
    assert_eq!(ask("why", text(&library)), "usable");
}

#[test]
fn a_library_without_a_function_is_refused_by_its_name() {
    for function in ["ucp_get_nbx", "ucp_am_recv_data_nbx", "ucp_request_free"] {
        let folder = Folder::new();
        let Some(library) = folder.pretender((1, 22), &[&format!("-D{function}=taken_away")]) else { return };
        assert_says(&ask("why", text(&library)), &[text(&library), "1.22.0", function, "1.13.0"]);
    }
    let folder = Folder::new();
    let Some(library) = folder.pretender((1, 22), &["-Ducp_get_version=taken_away"]) else { return };
    assert_says(&ask("why", text(&library)), &[text(&library), "no UCX library", LIBRARY]);
}

#[test]
fn what_is_no_library_or_not_there_is_refused_with_the_remedy() {
    let folder = Folder::new();
    let file = folder.0.join("libucp.so.0");
    for content in [&b""[..], b"no library", b"\x7fELF\x02\x01\x01"] {
        std::fs::write(&file, content).unwrap();
        assert_says(&ask("why", text(&file)), &[text(&file), "cannot be loaded", "1.13.0", LIBRARY]);
    }
    std::fs::remove_file(&file).unwrap();
    assert_says(&ask("why", text(&file)), &[text(&file), "No such file", "1.13.0", LIBRARY]);
    assert_says(&ask("why", text(&folder.0)), &[text(&folder.0), "cannot be loaded"]);
}

/// The library that this run is about, by its path.
fn own() -> Option<String> {
    if let Some(reason) = UcxProvider::unavailable() {
        absent("ucx", &reason);
        return None;
    }
    let asked = std::env::var(LIBRARY).unwrap_or_default();
    Some(ask("name", &asked).split(' ').next().unwrap().to_owned())
}

#[test]
fn a_second_build_is_refused_before_their_parts_mix() {
    let Some(own) = own() else { return };
    let folder = Folder::new();
    if let Some(other) = folder.pretender((1, 22), &[]) {
        assert_says(&ask(&format!("after {}", text(&other)), &own), &[text(&other), &own, LIBRARY]);
    }
    // Two real ones, where the system has another than the one that is asked for.
    let system = ask("name", "");
    let system = system.split(' ').next().unwrap();
    let real = |path: &str| std::fs::canonicalize(path).unwrap();
    if real(system) == real(&own) {
        return println!("skipped in part: {own} is the system's own build");
    }
    for (first, then) in [(system, own.as_str()), (&own, system)] {
        assert_says(
            &ask(&format!("after {first}"), then),
            &[text(&real(first)), then, "loaded in this process already"],
        );
        assert!(ask(&format!("after {first}"), first).starts_with(first), "one build twice is one build");
    }
}

#[test]
fn a_build_that_comes_later_is_named_beside_the_one_in_use() {
    let Some(own) = own() else { return };
    let folder = Folder::new();
    let Some(other) = folder.pretender((1, 22), &[]) else { return };
    let said = ask(&format!("before {}", text(&other)), &own);
    let [before, after] = said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
    assert!(before.starts_with(&own) && !before.contains("beside"), "{before}");
    assert!(after.starts_with(&own) && after.ends_with(&format!("beside {}", text(&other))), "{after}");
}

/// The pretender locks memory as drivers do, and the kernel has the word.
#[test]
fn memory_that_may_not_be_locked_is_told_with_limit_need_and_remedy() {
    let folder = Folder::new();
    let Some(library) = folder.pretender((1, 22), &[]) else { return };
    let remedy = ["ulimit -l unlimited", "IPC_LOCK"];
    let said = ask("lock 65536 incapable", text(&library));
    assert_says(&said, &["opening", EFA, "queues have to be locked", "65536", remedy[0], remedy[1]]);
    let said = ask("lock 1048576 incapable", text(&library));
    assert_says(&said, &["opening", "staging", "2097152", "1048576", "Out of memory", remedy[0], remedy[1]]);
    let said = ask("lock 3145728 incapable", text(&library));
    assert_says(&said, &["binding", &POOL_BYTES.to_string(), "3145728", "Out of memory", remedy[0], remedy[1]]);
    // Enough for all; and the capability has the limit not count.
    for role in ["lock 8388608 incapable", "lock 0 capable"] {
        let said = ask(role, text(&library));
        assert!(said == "bound" || said.starts_with("cannot be tried"), "{role}: {said}");
    }
}
