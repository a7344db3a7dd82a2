//! Stacks stay whole and right while the code of a process is not what it was: libraries loaded late, new images,
//! children, files that are deleted, replaced, or seen from another root.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use support::{Agent, Merged, Program, testprogs};

/// Length of the windows, as given to the agent.
const WINDOW: Duration = Duration::from_secs(2);

/// How the names of the programs of this test begin. Nobody else is sampled, so that the load of others is not theirs.
const NAMES: [&str; 5] = ["deleted", "deep", "program", "shapes", "burning_child"];

/// Samples of each program before shares mean something.
const ENOUGH: i64 = 200;

/// Where threads begin.
const ROOTS: [&str; 5] = ["_start", "clone3", "__clone3", "clone", "__clone"];

/// Stacks of `deep.c`, as far as they go through all of it.
const DEEP: (&str, &[&str]) = ("compare", &["sort", "realigned", "recurse", "run", "main"]);

/// A program, and a stack it has once it has changed: a function and callers of it, nearest first.
struct Subject {
    what: &'static str,
    program: Program,
    selector: String,
    stack: (&'static str, &'static [&'static str]),
    /// A function that it does not have.
    never: &'static str,
}

#[test]
#[ignore = "needs root and BPF"]
fn stacks_stay_whole_when_code_is_loaded_replaced_deleted_or_seen_from_elsewhere() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let mut subjects = vec![deleted(folder.path()), elsewhere(folder.path()), forked(), clock()];
    subjects.extend(replaced_program(folder.path()));
    let (mut loaded, mut became) = (loads(&testprogs().join("libplugin_1.so"), 1), becomes_another());

    let window = format!("{}s", WINDOW.as_secs());
    let hz = if support::is_emulated() { 99 } else { 397 };
    let options = ["-F", &hz.to_string(), "--cpu-budget", "off", "--window", &window];
    let names = NAMES.iter().flat_map(|&name| ["--comm", name]);
    let agent = Agent::start(&options.into_iter().chain(names).collect::<Vec<_>>());
    agent.wait_for_tables();
    for subject in [&loaded, &became] {
        agent.wait_for("stacks of a program before its change", || {
            let merged = agent.merge(&subject.selector);
            merged.has_stack("work", &["before_call", "main", "_start"]).then_some(())
        });
    }
    loaded.program.tell("now");
    became.program.tell("now");
    subjects.extend([loaded, became]);
    subjects.extend(replaced_library(folder.path(), &agent));

    for subject in &subjects {
        let (function, callers) = subject.stack;
        agent.wait_for(&format!("{}: {function} under {callers:?}", subject.what), || {
            agent.merge(&subject.selector).has_stack(function, callers).then_some(())
        });
    }
    let from = SystemTime::now() + WINDOW;
    for subject in &subjects {
        let merged = agent.wait_for(&format!("enough samples of {}", subject.what), || {
            let merged = agent.merge_since(&subject.selector, from);
            (merged.total > ENOUGH * 1_000_000_000 / hz).then_some(merged)
        });
        check(subject, &merged);
    }
    agent.stop();
}

#[track_caller]
fn check(subject: &Subject, merged: &Merged) {
    let &Subject { what, stack: (function, callers), never, .. } = subject;
    let share = merged.share_from(&ROOTS);
    assert!(share >= 0.99, "{what}: {share:.4} reach the root, not {:?}", merged.roots());
    assert!(merged.has_stack(function, callers), "{what}: no {function} under {callers:?}\n{merged:#?}");
    assert!(!merged.mentions(never), "{what} has no {never}\n{merged:#?}");
}

fn subject(
    what: &'static str,
    program: Program,
    stack: (&'static str, &'static [&'static str]),
    never: &'static str,
) -> Subject {
    let selector = format!("{{pid=\"{}\"}}", program.pid());
    Subject { what, program, selector, stack, never }
}

fn copy(program: &str, to: &Path) -> PathBuf {
    fs::copy(testprogs().join(program), to).expect("copy a test program");
    to.to_owned()
}

fn start(path: &Path) -> Program {
    Program::start_command(&mut Command::new(path))
}

/// Its file is gone before the agent starts.
fn deleted(folder: &Path) -> Subject {
    let path = copy("deep_gcc", &folder.join("deleted"));
    let program = start(&path);
    fs::remove_file(path).expect("delete a copy");
    subject("deleted program", program, DEEP, "in_child")
}

/// Code that no file backs, with functions of the kernel's making.
fn clock() -> Subject {
    let program = Program::start("shapes", &["clock"]);
    subject("vDSO", program, ("__vdso_clock_gettime", &["ask_clock", "main", "_start"]), "in_child")
}

/// Under another root, its paths name other files, or none, for the agent.
fn elsewhere(folder: &Path) -> Subject {
    let root = folder.join("root");
    let path = testprogs().join("deep_gcc");
    // What ldd(1) does: virtual machines do not have it.
    let listed = Command::new(&path).env("LD_TRACE_LOADED_OBJECTS", "1").output().expect("the loader runs");
    let libraries = String::from_utf8(listed.stdout).expect("text");
    let libraries = libraries.split_ascii_whitespace().filter(|word| word.starts_with('/'));
    for library in libraries {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().expect("below the root")).expect("make folders");
        fs::copy(library, to).expect("copy a library");
    }
    fs::copy(path, root.join("deep")).expect("copy a program");
    let program = Program::start_command(Command::new("chroot").arg(&root).arg("/deep"));
    subject("program under another root", program, DEEP, "in_child")
}

/// The child was never seen to start: it has the code of its parent without having mapped any.
fn forked() -> Subject {
    let program = Program::start("shapes", &["fork"]);
    let stack: (_, &[_]) = ("work", &["in_child", "fork_and_burn", "main", "_start"]);
    let mut subject = subject("forked child", program, stack, "before_call");
    subject.selector = "{exe=\"shapes\",thread_name=\"burning_child\"}".to_owned();
    subject
}

/// Two programs that were started from one path.
fn replaced_program(folder: &Path) -> [Subject; 2] {
    let path = copy("deep_gcc", &folder.join("program"));
    let before = start(&path);
    fs::rename(copy("rust_deep", &folder.join("next")), &path).expect("replace a copy");
    let after = start(&path);
    let rust: (_, &[_]) = ("rust_deep::weigh", &["rust_deep::sorted", "rust_deep::run", "main"]);
    [
        subject("replaced program", before, DEEP, "rust_deep"),
        subject("program that replaced it", after, rust, "realigned"),
    ]
}

fn loads(library: &Path, version: u32) -> Subject {
    let program = Program::start("shapes", &["load", library.to_str().expect("a plain path")]);
    let (stack, never): ((_, &[_]), _) = match version {
        1 => {
            (("work", &["plugin_inner_1", "plugin_work", "call_plugin", "main", "_start"]), "plugin_inner_2")
        }
        _ => {
            (("work", &["plugin_inner_2", "plugin_work", "call_plugin", "main", "_start"]), "plugin_inner_1")
        }
    };
    subject("program that loaded a library", program, stack, never)
}

/// Two processes that have loaded two libraries from one path, the first of which is gone.
fn replaced_library(folder: &Path, agent: &Agent) -> [Subject; 2] {
    let path = copy("libplugin_1.so", &folder.join("libplugin.so"));
    let mut before = loads(&path, 1);
    before.program.tell("now");
    agent.wait_for("the first version is loaded", || {
        let maps = fs::read_to_string(format!("/proc/{}/maps", before.program.pid())).ok()?;
        maps.contains("libplugin.so").then_some(())
    });
    fs::rename(copy("libplugin_2.so", &folder.join("next.so")), &path).expect("replace a copy");
    let mut after = loads(&path, 2);
    after.program.tell("now");
    [before, after]
}

/// The process stays, its code does not.
fn becomes_another() -> Subject {
    let next = testprogs().join("deep_clang");
    let next = if next.exists() { next } else { testprogs().join("deep_gcc") };
    let program = Program::start("shapes", &["exec", next.to_str().expect("a plain path"), "-"]);
    let mut subject = subject("program that became another", program, DEEP, "in_child");
    // Samples of before the change keep the labels of before it.
    subject.selector = format!("{{pid=\"{}\",exe=~\"deep.*|shapes\"}}", subject.program.pid());
    subject
}
