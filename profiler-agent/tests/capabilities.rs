//! What each capability gives, as the table in docs/config.md says it: taken away one by one.

#[path = "support/kernel.rs"]
mod kernel;
#[allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#[path = "support/patience.rs"]
mod patience;

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// All that the agent uses, as setpriv names them. The others it does without.
const USED: [&str; 6] = ["bpf", "perfmon", "sys_ptrace", "dac_read_search", "checkpoint_restore", "syslog"];

/// Another user and group than root: nobody.
const OTHER: &str = "65534";

/// A program that is ended with its test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).spawn().expect("it starts"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory that every user may enter.
fn open_directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("set the mode");
    directory
}

/// A copy of the program whose hottest function is `hot_loop`.
fn burn(directory: &Path) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testprogs/burn");
    let copy = directory.join("burn");
    fs::copy(built, &copy).expect("`cargo xtask testprogs` builds it");
    copy
}

fn as_other(program: &Path) -> Running {
    let user = ["--reuid", OTHER, "--regid", OTHER, "--clear-groups"];
    Running::start(Command::new("setpriv").args(user).arg(program))
}

/// Records a process as user root with all capabilities that are used, but for one: folded stacks, or how the agent ended.
fn record_without(missing: Option<&str>, pid: u32) -> Result<String, String> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let output = directory.path().join("out.folded");
    let kept = USED.iter().filter(|name| Some(**name) != missing);
    let bounds: String = kept.map(|name| format!(",+{name}")).collect();
    let ended = Command::new("setpriv")
        .args(["--inh-caps=-all", &format!("--bounding-set=-all{bounds}")])
        .args(["prlimit", kernel::locked_memory(), env!("CARGO_BIN_EXE_profiler-agent")])
        .args(["--cpu-budget", "off", "record", "-F", "199", "-d", "2s", "-p", &pid.to_string(), "-o"])
        .arg(&output)
        .env("PROFILER_CACHE_DIR", directory.path().join("cache"))
        .output()
        .expect("setpriv and prlimit are there");
    match ended.status.code() {
        Some(0) => Ok(fs::read_to_string(&output).expect("it was written")),
        code => Err(format!("{code:?}: {}", String::from_utf8_lossy(&ended.stderr))),
    }
}

/// Whether a recording names the program's function, with all capabilities and without one.
fn is_named(program: &Running, missing: &str) -> [bool; 2] {
    [None, Some(missing)].map(|missing| {
        let stacks = record_without(missing, program.0.id()).expect("a recording");
        assert!(!stacks.is_empty(), "samples there are in any case");
        stacks.contains("hot_loop")
    })
}

#[test]
#[ignore = "needs root and BPF"]
fn without_bpf_or_perfmon_nothing_works_and_the_capability_is_named() {
    let directory = open_directory();
    let program = Running::start(&mut Command::new(burn(directory.path())));
    for (missing, name) in [("bpf", "CAP_BPF"), ("perfmon", "CAP_PERFMON")] {
        let ended = record_without(Some(missing), program.0.id()).expect_err("it ends");
        assert!(ended.contains(name), "{ended}");
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn without_sys_ptrace_executables_of_other_users_are_unknown() {
    let directory = open_directory();
    let program = as_other(&burn(directory.path()));
    assert_eq!(is_named(&program, "sys_ptrace"), [true, false]);
}

#[test]
#[ignore = "needs root and BPF"]
fn without_dac_read_search_executables_that_others_may_not_read_are_unknown() {
    let directory = open_directory();
    let burn = burn(directory.path());
    let owner = OTHER.parse().ok();
    std::os::unix::fs::chown(&burn, owner, owner).expect("give the file away");
    fs::set_permissions(&burn, fs::Permissions::from_mode(0o500)).expect("set the mode");
    let program = as_other(&burn);
    assert_eq!(is_named(&program, "dac_read_search"), [true, false]);
}

#[test]
#[ignore = "needs root and BPF"]
fn without_checkpoint_restore_deleted_executables_are_unknown() {
    let directory = open_directory();
    let burn = burn(directory.path());
    let program = Running::start(&mut Command::new(&burn));
    // The exec is over when the file is mapped.
    let mapped = || fs::read_link(format!("/proc/{}/exe", program.0.id())).is_ok_and(|exe| exe == burn);
    patience::wait_for(Duration::from_secs(60), Duration::from_millis(10), "exec", String::new, || {
        mapped().then_some(())
    });
    fs::remove_file(&burn).expect("remove the file");
    assert_eq!(is_named(&program, "checkpoint_restore"), [true, false]);
}

#[test]
#[ignore = "needs root and BPF"]
fn without_syslog_kernel_frames_have_no_names() {
    let program =
        Running::start(Command::new("dd").args(["if=/dev/zero", "of=/dev/null", "bs=1M", "status=none"]));
    let [with, without] =
        [None, Some("syslog")].map(|missing| record_without(missing, program.0.id()).expect("a recording"));
    let is_unnamed = |stacks: &str| stacks.split([';', '\n']).any(|frame| frame.starts_with("[kernel]"));
    assert!(with.contains("read_zero") || with.contains("vfs_read"), "{with}");
    let setting = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}")).expect("it is there");
    let are_shown = setting("kptr_restrict").trim() == "0"
        && setting("perf_event_paranoid").trim().parse::<i32>().is_ok_and(|level| level <= 1);
    assert_eq!(is_unnamed(&without), !are_shown, "{without}");
}

/// A setting of the kernel, as it was before when dropped.
struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    fn change(name: &str, value: &str) -> Self {
        let path = Path::new("/proc/sys/kernel").join(name);
        let before = fs::read_to_string(&path).expect("it is there");
        fs::write(&path, value).expect("root may set it");
        Self { path, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, &self.before) {
            eprintln!("{} stays changed: {error}", self.path.display());
        }
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn a_kernel_that_refuses_events_without_sys_admin_is_told_with_its_setting() {
    let directory = open_directory();
    let program = Running::start(&mut Command::new(burn(directory.path())));
    let _level = Setting::change("perf_event_paranoid", "3");
    match record_without(None, program.0.id()) {
        Ok(_) => {
            let name = "a_kernel_that_refuses_events_without_sys_admin_is_told_with_its_setting";
            writeln!(std::io::stdout(), "SKIP {name}: this kernel has no such level").expect("it is open");
        }
        Err(ended) => assert!(ended.contains("kernel.perf_event_paranoid is 3"), "{ended}"),
    }
}
