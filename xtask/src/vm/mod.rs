//! `cargo xtask vm`: the root tests on Debian's kernels, each booted by qemu without hardware support.
//!
//! A machine is a kernel and an archive of files, which is its root file system: busybox, the agent, and the test programs
//! as cargo has built them, at the same paths as here, each with the libraries it is linked with. The agent is linked
//! statically, as one is that has to run anywhere. A machine's time is the number of instructions it has executed
//! (`-icount`), so what a test sees does not depend on how busy the host is.

mod image;
mod kernel;
mod qemu;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, builder::PossibleValuesParser};

use self::{
    image::Image,
    kernel::{KERNELS, Kernel, Version},
    qemu::Machine,
};
use crate::{
    command, project,
    tally::Tally,
    testprogs,
    tools::{self, BUSYBOX, CONTAINERD, GO, NODE, QEMU},
};

/// What the machine runs first.
const INIT: &[u8] = include_bytes!("init.sh");

/// Where the machine has the test programs of cargo, by their plain names.
const TESTS: &str = "/tests";

/// Test files that are not run, and why. All others pass on every kernel.
const LACKS: [(&str, &str); 2] = [
    ("browser", "it needs Chromium"),
    ("budget", "on 7.2 its totals are off by 3.1 to 14 %, where 3 % is accepted; on 6.12 they are not"),
];

/// Those that take minutes each, which are not run where one kernel is for others.
const LONG: [&str; 5] = ["containers", "heap", "hostile", "own_names", "stress"];

/// Those that are about more than one processor. Where all run on two, each takes longer: they share what one can do.
const ON_TWO_PROCESSORS: [&str; 2] = ["budget", "hotplug"];

/// Programs of the host that tests start.
const HOST_PROGRAMS: [&str; 10] = [
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "dd",
    "nice",
    "node",
    "prlimit",
    "runc",
    "setpriv",
    "unshare",
];

#[derive(Args)]
pub(crate) struct Options {
    /// Kernels, by the version they are known by; all when there is none.
    #[arg(value_name = "VERSION", value_parser = PossibleValuesParser::new(KERNELS.map(|kernel| kernel.name)))]
    versions: Vec<String>,
    /// Only these files of profiler-agent/tests.
    #[arg(long, value_name = "NAME")]
    test: Vec<String>,
    /// Fetch the kernels anew: the newest that Debian has.
    #[arg(long)]
    refresh: bool,
}

/// Runs the tests on the kernels chosen, and prints what came of it by kernel and test.
pub(crate) fn run(options: &Options) -> Result<Tally> {
    let Options { versions, test, refresh } = options;
    let chosen = |kernel: &&Kernel| versions.is_empty() || versions.iter().any(|name| name == kernel.name);
    let choice = if test.is_empty() { Choice::All } else { Choice::Only(test) };
    run_on(KERNELS.iter().filter(chosen), &choice, *refresh)
}

/// The kernel that is most unlike today's, with the tests that are not long.
pub(crate) fn oldest() -> Result<Tally> {
    run_on(&KERNELS[..1], &Choice::Short, false)
}

/// Which test files are run.
enum Choice<'a> {
    All,
    Short,
    Only(&'a [String]),
}

impl Choice<'_> {
    /// The names to build, as cargo takes them.
    fn names(&self) -> Vec<&str> {
        match self {
            Self::All | Self::Short => vec!["*"],
            Self::Only(names) => names.iter().map(String::as_str).collect(),
        }
    }

    /// Why a file that is built is not run.
    fn lacks(&self, name: &str) -> Option<&'static str> {
        let lacks = LACKS.iter().find(|(test, _)| *test == name).map(|&(_, lacks)| lacks);
        match self {
            Self::Only(_) => None,
            Self::All => lacks,
            Self::Short => {
                lacks.or_else(|| LONG.contains(&name).then_some("it takes minutes; `cargo xtask vm` runs it"))
            }
        }
    }
}

fn run_on<'a>(
    kernels: impl IntoIterator<Item = &'a Kernel>,
    choice: &Choice<'_>,
    refresh: bool,
) -> Result<Tally> {
    ensure!(cfg!(target_arch = "x86_64"), "the machines are x86-64, and so must be the programs built here");
    tools::need(&[QEMU, BUSYBOX, GO, NODE, CONTAINERD])?;
    testprogs::build()?;
    // First: both agents are put at one path.
    let agent = static_agent()?;
    let mut tests = built_tests(&choice.names())?;
    let mut total = Tally::default();
    tests.programs.retain(|Program { name, .. }| {
        let Some(lacks) = choice.lacks(name) else { return true };
        println!("SKIP {name}: {lacks}");
        total += Tally::SKIPPED;
        false
    });
    ensure!(!tests.programs.is_empty(), "no test is left to run");
    let archive = pack(&agent, &tests)?;
    let mut rows = Vec::new();
    for kernel in kernels {
        let start = Instant::now();
        let row = match boot(kernel, &archive, &tests, refresh) {
            Ok((version, ran)) => Row { kernel, version: version.release, ran },
            Err(error) => {
                println!("FAILED: {}: {error:#}", kernel.name);
                Row { kernel, version: String::new(), ran: Vec::new() }
            }
        };
        println!("-- {}: {:.1} s", kernel.name, start.elapsed().as_secs_f64());
        rows.push(row);
    }
    for Program { name, .. } in &tests.programs {
        rows.iter().for_each(|row| total += row.of(name));
    }
    print_table(&tests, &rows);
    println!("\n{total}");
    Ok(total)
}

/// What came of each test file on one kernel.
struct Row<'a> {
    kernel: &'a Kernel,
    version: String,
    ran: Vec<(String, Tally)>,
}

impl Row<'_> {
    /// A test file without a result has failed: the machine ended before it.
    fn of(&self, test: &str) -> Tally {
        let found = self.ran.iter().find(|(name, _)| name == test);
        found.map_or(Tally::FAILED, |&(_, tally)| tally)
    }
}

fn boot(
    kernel: &Kernel,
    archive: &Path,
    tests: &Built,
    refresh: bool,
) -> Result<(Version, Vec<(String, Tally)>)> {
    let version = kernel.get(refresh)?;
    println!("\n-- {}: {}, cgroup {}", kernel.name, version.release, kernel.cgroup);
    let names = tests.programs.iter().map(|program| program.name.as_str());
    let (of_two, of_one): (Vec<_>, Vec<_>) = names.partition(|name| ON_TWO_PROCESSORS.contains(name));
    let (image, cgroup) = (version.image.as_path(), kernel.cgroup);
    let mut ran = Vec::new();
    for (processors, names) in [(1, of_one), (2, of_two)].into_iter().filter(|(_, names)| !names.is_empty()) {
        if processors <= kernel.processors {
            ran.extend(qemu::run(&Machine { kernel: image, archive, cgroup, processors }, &names)?);
        } else {
            ran.extend(names.into_iter().map(skip_for_processors));
        }
    }
    Ok((version, ran))
}

fn skip_for_processors(test: &str) -> (String, Tally) {
    println!("SKIP {test}: this kernel brings up one processor under emulation");
    (test.to_owned(), Tally::SKIPPED)
}

fn print_table(tests: &Built, rows: &[Row<'_>]) {
    let width = tests.programs.iter().map(|program| program.name.len()).max().unwrap_or(0).max(4);
    print!("\n{:<width$}", "test");
    rows.iter().for_each(|row| print!("  {:>12}", row.kernel.name));
    println!();
    for Program { name, .. } in &tests.programs {
        print!("{name:<width$}");
        for row in rows {
            let Tally { passed, failed, skipped } = row.of(name);
            print!("  {:>12}", format!("{passed}/{failed}/{skipped}"));
        }
        println!();
    }
    println!("(passed/failed/skipped)");
    for Row { kernel, version, .. } in rows {
        println!("{}: {version}, cgroup {}", kernel.name, kernel.cgroup);
    }
}

/// What cargo built.
struct Built {
    agent: PathBuf,
    programs: Vec<Program>,
}

/// One file of profiler-agent/tests.
struct Program {
    name: String,
    file: PathBuf,
}

/// Builds an agent that needs no library of the machine it runs on; gives its path in `target/vm`.
///
/// Only the agent's own crate is compiled for it: what links the C library statically is decided when the program is
/// linked, so that everything else is what the tests were built with.
fn static_agent() -> Result<PathBuf> {
    let mut cargo = command::cargo();
    cargo.args(["rustc", "--release", "--locked", "--package", "profiler-agent", "--bin", "profiler-agent"]);
    cargo.args(["--message-format", "json-render-diagnostics", "--", "-C", "target-feature=+crt-static"]);
    let built = parse_messages(&command::output(&mut cargo)?)?.agent;
    let dir = project::target().join("vm");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let agent = dir.join("profiler-agent");
    command::run(Command::new("strip").arg("-o").arg(&agent).arg(&built))?;
    let headers = command::output(Command::new("readelf").arg("--program-headers").arg(&agent))?;
    ensure!(!headers.contains("INTERP"), "{} asks for a dynamic linker", agent.display());
    Ok(agent)
}

/// Builds these of the agent's tests; says where they are.
fn built_tests(names: &[&str]) -> Result<Built> {
    let mut cargo = command::cargo();
    cargo.args(["test", "--release", "--locked", "--package", "profiler-agent", "--no-run"]);
    cargo.args(names.iter().flat_map(|name| ["--test", *name]));
    let messages = command::output(cargo.args(["--message-format", "json-render-diagnostics"]))?;
    parse_messages(&messages)
}

/// Reads cargo's messages about what it has built (cargo book, "External tools").
fn parse_messages(messages: &str) -> Result<Built> {
    let (mut agent, mut programs) = (None, Vec::new());
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("read cargo's message")?;
        let Some(file) = message["executable"].as_str().map(PathBuf::from) else { continue };
        let name = message["target"]["name"].as_str().context("an artifact without a name")?;
        match message["target"]["kind"][0].as_str() {
            Some("bin") if name == "profiler-agent" => agent = Some(file),
            Some("test") => programs.push(Program { name: name.to_owned(), file }),
            _ => {}
        }
    }
    programs.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(Built { agent: agent.context("cargo has built no agent")?, programs })
}

/// Writes the archive that is the machines' root file system; gives its path.
fn pack(agent: &Path, tests: &Built) -> Result<PathBuf> {
    let dir = project::target().join("vm");
    let mut image = Image::default();
    image.bytes("/init", 0o755, INIT.to_vec());
    image.bytes("/bin/busybox", 0o755, read(&find("busybox")?)?);
    // Busybox's own shell takes its applets for programs, whatever is in PATH.
    image.program_as(&find("sh")?, Path::new("/bin/sh"))?;
    // The client refuses to start without any, whether it needs them or not.
    image.bytes(
        "/etc/ssl/certs/ca-certificates.crt",
        0o644,
        read("/etc/ssl/certs/ca-certificates.crt".as_ref())?,
    );
    // What containerd gives to containers.
    image.bytes("/etc/hosts", 0o644, b"127.0.0.1 localhost\n".to_vec());
    image.bytes("/etc/resolv.conf", 0o644, Vec::new());
    image.program_as(agent, &tests.agent)?;
    for Program { name, file } in &tests.programs {
        image.stripped(file, &Path::new(TESTS).join(name))?;
    }
    for program in HOST_PROGRAMS {
        image.program_as(&find(program)?, &Path::new("/usr/bin").join(program))?;
    }
    // Paths that lead out of the package's folder lead nowhere without it.
    image.folder(&project::root().join("profiler-agent"));
    for file in project::files_under(&project::root().join("docs"))? {
        image.program(&project::root().join("docs").join(file))?;
    }
    for file in project::files_under(&project::target().join("testprogs"))? {
        image.program(&project::target().join("testprogs").join(file))?;
    }
    // The tests ask `go tool pprof`, and nothing else of Go.
    image.program_as(&build_pprof(&dir)?, Path::new("/bin/pprof"))?;
    image.bytes("/bin/go", 0o755, b"#!/bin/sh\nshift 2\nexec /bin/pprof \"$@\"\n".to_vec());
    add_python(&mut image)?;
    add_libc_names(&mut image)?;
    let archive = dir.join("root.cpio");
    fs::write(&archive, image.cpio()).with_context(|| format!("write {}", archive.display()))?;
    println!("{}: {} MiB", archive.display(), fs::metadata(&archive)?.len() >> 20);
    Ok(archive)
}

fn build_pprof(dir: &Path) -> Result<PathBuf> {
    let file = dir.join("pprof");
    if !file.exists() {
        let mut go = Command::new("go");
        go.env("GOTOOLCHAIN", "local").env("GOFLAGS", "");
        command::run(go.args(["build", "-ldflags=-s -w", "-o"]).arg(&file).arg("cmd/pprof"))?;
    }
    Ok(file)
}

/// Prints the files of all modules that the tests' programs load, and the program itself.
const PYTHON_FILES: &str = "
import json, re, site, sys, traceback
print(*{getattr(module, '__file__', None) or '' for module in sys.modules.values()}, sys.executable, sep='\\n')
";

/// The host's python with the modules that tests use, where it has one: a large program without frame pointers.
fn add_python(image: &mut Image) -> Result<()> {
    let python = Path::new("/usr/bin/python3");
    let files = command::probe(Command::new(python).args(["-c", PYTHON_FILES]));
    let Some(files) = files.filter(|files| !files.is_empty()) else {
        println!("no {}: the tests skip it", python.display());
        return Ok(());
    };
    for file in files.lines().filter(|line| line.starts_with('/')).collect::<BTreeSet<_>>() {
        image.program(Path::new(file))?;
    }
    let real = fs::canonicalize(python).with_context(|| format!("follow {}", python.display()))?;
    if real != python {
        image.program(&real)?;
        image.link("/usr/bin/python3", &real.to_string_lossy());
    }
    Ok(())
}

/// The debug file of libc, where it is installed: only there is the function named that threads begin in.
fn add_libc_names(image: &mut Image) -> Result<()> {
    let libc =
        image.paths().find(|path| path.ends_with("libc.so.6")).context("no program needs libc")?.to_owned();
    let notes = command::output(Command::new("readelf").arg("--notes").arg(&libc))?;
    let id = notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: "));
    let (folder, file) = id.and_then(|id| id.split_at_checked(2)).context("libc has no build id")?;
    let debug = format!("/usr/lib/debug/.build-id/{folder}/{file}.debug");
    if Path::new(&debug).exists() {
        image.program(Path::new(&debug))?;
    } else {
        println!("no {debug}: libc's own functions have no names in the machine");
    }
    Ok(())
}

fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An ordinary user's does not lead to runc.
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    match dirs.map(|dir| dir.join(program)).find(|file| file.is_file()) {
        Some(file) => fs::canonicalize(&file).with_context(|| format!("follow {}", file.display())),
        None => bail!("{program} is not in PATH"),
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_taken_from_the_messages_of_cargo() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"profiler-agent"},"executable":"/t/agent"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"unwind"},"executable":"/t/unwind-1"}
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"other"},"executable":null}
{"reason":"build-finished","success":true}"#;
        let Built { agent, programs } = parse_messages(messages).expect("messages");
        assert_eq!(agent, Path::new("/t/agent"));
        let programs: Vec<_> = programs.into_iter().map(|program| (program.name, program.file)).collect();
        assert_eq!(programs, [("unwind".to_owned(), PathBuf::from("/t/unwind-1"))]);
    }

    #[test]
    fn what_is_left_out_has_a_reason_unless_it_is_asked_for() {
        assert_eq!(Choice::All.lacks("browser"), Some("it needs Chromium"));
        assert_eq!((Choice::All.lacks("heap"), Choice::Short.lacks("names")), (None, None));
        assert!(Choice::Short.lacks("heap").is_some_and(|reason| reason.contains("minutes")));
        assert_eq!(Choice::Only(&["browser".to_owned()]).lacks("browser"), None);
    }

    #[test]
    fn a_test_without_a_result_has_failed() {
        let ran = vec![("names".to_owned(), Tally::PASSED)];
        let row = Row { kernel: &KERNELS[0], version: String::new(), ran };
        assert_eq!(row.of("names"), Tally::PASSED);
        assert_eq!(row.of("unwind"), Tally::FAILED);
    }
}
