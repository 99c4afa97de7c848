//! `kvferry plugins` on NIXL's real wheels: which plugin fits which core, as loading them shows (the matrix of NIXL's releases).
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvferry_transport::conformance::absent;
use serde_json::Value;

/// Package and version, as pip names them.
const WHEELS: [(&str, &str); 4] =
    [("nixl", "0.4.1"), ("nixl-cu12", "0.10.1"), ("nixl-cu12", "1.0.1"), ("nixl-cu12", "1.5.1")];

fn plugins(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
    command.arg("plugins").args(arguments).env_clear().output().unwrap()
}

fn told(arguments: &[&str]) -> Value {
    let output = plugins(&[arguments, &["--json"]].concat());
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr)));
    let code = ["compatible", "unknown", "incompatible"].iter().position(|word| report["verdict"] == **word).unwrap();
    assert_eq!(output.status.code(), Some(code as i32), "the exit code follows the verdict");
    report
}

/// The unpacked wheel, fetched if it is not there; what stands against it otherwise.
fn wheel(package: &str, version: &str) -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/nixl");
    let unpacked = folder.join(version);
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let python = |arguments: &[&str]| {
        let output = Command::new("python3").args(arguments).output().map_err(|error| format!("python3: {error}"))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                Err(format!("python3 {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
            }
        }
    };
    std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let (there, what) = (folder.to_str().unwrap(), format!("{package}=={version}"));
    // Any of its wheels will do: Python is not what is looked at.
    let wanted = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"];
    let download = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", there];
    python(&[&download[..], &wanted, &[what.as_str()]].concat())?;
    let begins = format!("{}-{version}-", package.replace('-', "_"));
    let names = std::fs::read_dir(&folder).map_err(|error| error.to_string())?.flatten();
    let file = names.map(|entry| entry.path()).find(|path| {
        path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with(&begins) && name.ends_with(".whl")
        })
    });
    let file = file.ok_or_else(|| format!("pip left no {begins}*.whl"))?;
    // Half an unpacked wheel must not look like one.
    let half = folder.join(format!("{version}.part"));
    let _ = std::fs::remove_dir_all(&half);
    python(&["-m", "zipfile", "-e", file.to_str().unwrap(), half.to_str().unwrap()])?;
    std::fs::rename(&half, &unpacked).map_err(|error| error.to_string())?;
    Ok(unpacked)
}

fn plugin_folder(wheel: &Path) -> PathBuf {
    let inner = std::fs::read_dir(wheel).unwrap().flatten().map(|entry| entry.path());
    inner.map(|path| path.join("plugins")).find(|path| path.is_dir()).unwrap()
}

/// Verdict and first reason of one plugin of `plugins` under `core`.
fn verdict(core: &Path, plugins: &Path, name: &str) -> (String, Value) {
    let file = plugin_folder(plugins).join(format!("libplugin_{name}.so"));
    let report = told(&["--core", core.to_str().unwrap(), file.to_str().unwrap()]);
    let plugin = report["plugins"][0].clone();
    (plugin["verdict"].as_str().unwrap().to_owned(), plugin)
}

fn reasons(plugin: &Value) -> String {
    plugin["reasons"].as_array().unwrap().iter().map(|reason| reason.as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

#[test]
fn wheels_fit_or_do_not_as_loading_them_shows() {
    if !cfg!(target_arch = "x86_64") {
        return absent("nixl", "the wheels are x86-64's");
    }
    let mut folders = Vec::new();
    for (package, version) in WHEELS {
        match wheel(package, version) {
            Ok(folder) => folders.push(folder),
            Err(reason) => return absent("nixl", &format!("NIXL {version} cannot be fetched: {reason}")),
        }
    }
    let [old, before, first, newest] = &folders[..] else { panic!("four wheels") };

    // Each with its own.
    for folder in &folders {
        let own = told(&["--core", folder.to_str().unwrap(), "--only", "UCX"]);
        assert_eq!(own["verdict"], "compatible", "{own:#}");
        assert_eq!(own["plugins"][0]["probe"]["told"]["plugin"]["api_version"], 1);
        assert_eq!(own["plugins"][0]["probe"]["told"]["plugin"]["name"], "UCX");
    }
    // The fingerprints of the releases.
    for (folder, bytes, slots) in [(old, 216, 25), (before, 264, 31), (first, 232, 27), (newest, 232, 27)] {
        let (_, plugin) = verdict(folder, folder, "UCX");
        assert_eq!((&plugin["vtable"]["bytes"], &plugin["vtable"]["slots"]), (&bytes.into(), &slots.into()));
    }
    // What loads and works.
    assert_eq!(verdict(newest, first, "UCX").0, "compatible");
    assert_eq!(verdict(newest, first, "POSIX").0, "compatible");
    // What the loader refuses, and by which symbol.
    for (core, plugins, name, word) in [
        (newest, before, "UCX", "nixl_invalid_agent"),
        (newest, old, "UCX", "absl"),
        (first, newest, "UCX", "_M_replace_cold"),
        (before, first, "UCX", "nixl_null_agent"),
        (before, newest, "UCX", "nixl_null_agent"),
        (old, first, "UCX", "nixl_null_agent"),
        (first, before, "POSIX", "nixlDescListI12nixlBlobDesc"),
    ] {
        let (verdict, plugin) = verdict(core, plugins, name);
        assert_eq!(verdict, "incompatible", "{plugin:#}");
        let undefined = plugin["undefined"].to_string();
        assert!(undefined.contains(word) || reasons(&plugin).contains(word), "no {word} in {plugin:#}");
        assert!(plugin["remedy"].as_str().unwrap().contains("NIXL_PLUGIN_DIR="), "{plugin:#}");
        // The loader agrees.
        assert!(plugin["probe"]["told"]["refused"].is_string(), "{plugin:#}");
    }
    // The doctor says the same of what the environment names, and loads nothing.
    for (core, plugins, code) in [(newest, first, 0), (newest, before, 2), (before, newest, 2)] {
        let (core, plugins) = (plugin_folder(core).parent().unwrap().to_owned(), plugin_folder(plugins));
        let mut doctor = Command::new(env!("CARGO_BIN_EXE_kvferry"));
        doctor.args(["doctor", "--json"]).env_clear().env("LD_LIBRARY_PATH", &core).env("NIXL_PLUGIN_DIR", &plugins);
        let report: Value = serde_json::from_slice(&doctor.output().unwrap().stdout).unwrap();
        let abi = report["checks"].as_array().unwrap().iter().find(|check| check["id"] == "nixl.abi").unwrap();
        assert_eq!(abi["status"], if code == 0 { "ok" } else { "fail" }, "{abi:#}");
        assert!(code == 0 || abi["fix"].as_str().unwrap().contains("NIXL_PLUGIN_DIR="), "{abi:#}");
        assert!(abi["evidence"][0].as_str().unwrap().contains(core.to_str().unwrap()), "{abi:#}");
    }
    // The silent one: it loads, claims interface 1, and ends the process by a call of the wrong function.
    let (silent, plugin) = verdict(before, first, "POSIX");
    assert_eq!(silent, "incompatible");
    assert_eq!(plugin["probe"]["told"]["plugin"]["api_version"], 1);
    assert_eq!(plugin["undefined"].as_array().unwrap().len(), 0);
    let reasons = reasons(&plugin);
    assert!(reasons.contains("it loads, and crashes when it is used") && reasons.contains("NIXL 0.10.1"), "{reasons}");
}

#[test]
fn what_cannot_be_judged_is_said_with_a_remedy() {
    let folder = std::env::temp_dir().join(format!("kvferry-plugins-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("plugins")).unwrap();
    std::fs::write(folder.join("libnixl.so"), "not a library").unwrap();
    let place = folder.to_str().unwrap();
    for (arguments, words) in [
        (vec!["--core", "/nonexistent"], ["/nonexistent", "libnixl.so"]),
        (vec![], ["the loader finds no libnixl.so", "--core"]),
        (vec!["--core", place], ["libnixl.so: byte 0x0", "fetch it again"]),
    ] {
        let output = plugins(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no {word:?} in {text}");
        }
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// A pipe is not waited for, and whoever loads a plugin that hangs ends with who asked.
#[test]
fn what_hangs_keeps_nobody() {
    let folder = std::env::temp_dir().join(format!("kvferry-hanging-plugins-{}", std::process::id()));
    let fake = Fake { folder: folder.clone() };
    std::fs::create_dir_all(folder.join("plugins")).unwrap();
    let pipe = folder.join("plugins/libplugin_PIPE.so");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // It says who it is, and stays.
    let (mark, stays) = (folder.join("mark"), "extern \"C\" int getpid(void); extern \"C\" int pause(void);");
    let hang = format!(
        "#include <cstdio>\n{stays} __attribute__((constructor)) void hang() {{ FILE *f = fopen(\"{}\", \"w\"); fprintf(f, \"%d\", getpid()); \
         fclose(f); for (;;) pause(); }}",
        mark.display()
    );
    if !(fake.build("libnixl.so", "int nixl;", 1) && fake.build("plugins/libplugin_HANG.so", &hang, 1)) {
        let _ = std::fs::remove_dir_all(&folder);
        return absent("c++", "there is no C++ compiler");
    }
    let core = folder.to_str().unwrap();
    let begun = std::time::Instant::now();
    let report = told(&["--core", core, "--only", "PIPE"]);
    assert!(begun.elapsed() < std::time::Duration::from_secs(10), "it was waited for");
    assert_eq!(report["plugins"][0]["verdict"], "incompatible", "{report:#}");
    assert!(reasons(&report["plugins"][0]).contains("it is no file"), "{report:#}");

    // A name of another case is no name.
    let other = plugins(&["--core", core, "--only", "pipe"]);
    let words = String::from_utf8(other.stderr).unwrap();
    assert!(other.status.code() == Some(2) && words.contains("no libplugin_pipe.so in "), "{words}");

    // Who asked may be gone before whoever loads it can ask the kernel to be ended with them.
    let late = Command::new(env!("CARGO_BIN_EXE_kvferry"))
        .args(["load-plugin", &format!("{core}/libnixl.so"), &format!("{core}/plugins/libplugin_HANG.so")])
        .env("KVFERRY_ASKED_BY", "1")
        .status();
    assert!(!late.unwrap().success() && !mark.exists(), "it has loaded it for nobody");

    let mut asks = Command::new(env!("CARGO_BIN_EXE_kvferry"))
        .args(["plugins", "--core", core, "--only", "HANG"])
        .env_clear()
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let loads = || std::fs::read_to_string(&mark).ok()?.parse::<i32>().ok();
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(15);
        while !done() {
            assert!(std::time::Instant::now() < until, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    wait("nobody loads it", &|| loads().is_some());
    asks.kill().unwrap();
    asks.wait().unwrap();
    let status = format!("/proc/{}/stat", loads().unwrap());
    // Gone, or waiting for an init that takes its time.
    let ended = || std::fs::read_to_string(&status).map_or(true, |stat| stat.contains(") Z ") || stat.contains(") X "));
    wait("it outlives who asked", &ended);
    std::fs::remove_dir_all(folder).unwrap();
}

/// Plugins that crash, hang up, or claim another interface: the process that loads them is not this one.
#[test]
fn a_plugin_that_ends_its_process_is_a_verdict() {
    let folder = std::env::temp_dir().join(format!("kvferry-fake-plugins-{}", std::process::id()));
    let fake = Fake { folder: folder.clone() };
    std::fs::create_dir_all(folder.join("plugins")).unwrap();
    let engine = "struct nixlBackendEngine { virtual int supportsRemote(); virtual int supportsLocal(); };
        int nixlBackendEngine::supportsRemote() { return 0; } int nixlBackendEngine::supportsLocal() { return 1; }
        struct P { int v; void *a[6]; }; static P p = {API, {0, 0, 0, 0, 0, 0}};";
    let init = "extern \"C\" void *nixl_plugin_init() { return &p; }";
    let built = fake.build("libnixl.so", "int nixl;", 1)
        && fake.build("plugins/libplugin_GOOD.so", &format!("{engine} {init}"), 1)
        && fake.build("plugins/libplugin_ALIAS.so", &format!("{engine} static const char *called() {{ return \"ELSE\"; }}
            static P q = {{API, {{0, 0, (void *)called, 0, 0, 0}}}}; extern \"C\" void *nixl_plugin_init() {{ return &q; }}"), 1)
        && fake.build("plugins/libplugin_OTHER.so", &format!("{engine} {init}"), 2)
        && fake.build("plugins/libplugin_CRASH.so", &format!("{engine} extern \"C\" void *nixl_plugin_init() {{ __builtin_trap(); }}"), 1)
        && fake.build("plugins/libplugin_LEAVE.so", &format!("{engine} extern \"C\" void _exit(int); __attribute__((constructor)) void leave() {{ _exit(3); }} {init}"), 1)
        && fake.build("plugins/libplugin_NULL.so", &format!("{engine} extern \"C\" void *nixl_plugin_init() {{ return 0; }}"), 1)
        && fake.build("plugins/libtelemetry_exporter_OWN.so", "extern \"C\" void *nixl_telemetry_plugin_init() { return 0; }", 1)
        && fake.build("plugins/libplugin_NOINIT.so", engine, 1);
    if !built {
        let _ = std::fs::remove_dir_all(&folder);
        return absent("c++", "there is no C++ compiler");
    }
    let report = told(&["--core", folder.to_str().unwrap()]);
    let found = |name: &str| {
        let plugins = report["plugins"].as_array().unwrap();
        let plugin = plugins.iter().find(|plugin| plugin["name"] == name).unwrap();
        (plugin["verdict"].as_str().unwrap(), reasons(plugin))
    };
    assert_eq!(found("GOOD").0, "compatible", "{report:#}");
    for (name, word) in [
        ("OTHER", "its interface has version 2"),
        ("CRASH", "is ended by signal"),
        ("LEAVE", "ends itself with code 3"),
        ("NULL", "returns nothing"),
        ("NOINIT", "exports none of nixl_plugin_init"),
    ] {
        let (verdict, reasons) = found(name);
        assert_eq!(verdict, "incompatible", "{name}");
        assert!(reasons.contains(word), "{name}: no {word:?} in {reasons}");
    }
    // Nothing tells releases of these apart; but it came with the core.
    assert_eq!(found("OWN").0, "compatible", "{report:#}");
    let (verdict, words) = found("ALIAS");
    assert!(verdict == "unknown" && words.contains("that of ALIAS, and it calls itself ELSE"), "{verdict}: {words}");
    // Without loading, the interface is not known.
    let unloaded = told(&["--core", folder.to_str().unwrap(), "--no-load", "--only", "GOOD"]);
    assert_eq!(unloaded["verdict"], "unknown");
    std::fs::remove_dir_all(folder).unwrap();
}

struct Fake {
    folder: PathBuf,
}

impl Fake {
    fn build(&self, name: &str, source: &str, api: i32) -> bool {
        let file = self.folder.join("source.cpp");
        std::fs::write(&file, source).unwrap();
        let mut command = Command::new("c++");
        command.args(["-shared", "-fPIC", "-O1", &format!("-DAPI={api}"), "-o"]);
        let status = command.arg(self.folder.join(name)).arg(&file).status();
        match status {
            Ok(status) => {
                assert!(status.success(), "{name} does not compile");
                true
            }
            Err(_) => false,
        }
    }
}
