//! Builds `testprogs/` into `target/testprogs`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    command, project,
    tally::Tally,
    tools::{self, CC, GO},
};

const C_PROGRAMS: [&str; 3] = ["burn", "short", "fork_storm"];

/// Linked statically into `container/`, which is all that the test's container images hold.
const CONTAINER_PROGRAMS: [&str; 2] = ["burn", "pause"];

/// Frame pointers in every function, and no call that takes its caller's place: stacks are as the sources read.
const C_FLAGS: [&str; 10] = [
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-O2",
    "-g1",
    "-fno-omit-frame-pointer",
    "-mno-omit-leaf-frame-pointer",
    "-fno-optimize-sibling-calls",
    "-pthread",
];

/// As distributions build: no frame pointers. Nothing but unwind information leads from frame to caller.
const DEEP_FLAGS: [&str; 9] = [
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-function",
    "-O2",
    "-g1",
    "-fomit-frame-pointer",
    "-pthread",
];

/// `deep.c` by compiler, and the program it makes. Those that are not installed are skipped.
const DEEP_COMPILERS: [(&str, &str); 2] = [("gcc", "deep_gcc"), ("clang", "deep_clang")];

/// `heap_truth.c` by compiler, and the program it makes; the second one is linked with musl. Not installed: skipped.
const HEAP_COMPILERS: [(&str, &str); 2] = [("cc", "heap_truth"), ("musl-gcc", "heap_truth_musl")];

const RUST_FLAGS: [&str; 5] =
    ["--edition=2024", "-O", "-Cforce-frame-pointers=yes", "-Cdebuginfo=1", "-Dwarnings"];

/// Builds those programs whose sources or flags are newer than they are; counts each that is there.
pub(crate) fn build() -> Result<Tally> {
    let into = project::target().join("testprogs");
    fs::create_dir_all(into.join("container")).with_context(|| format!("create {}", into.display()))?;
    let from = project::root().join("testprogs");
    let mut tally = Tally::default();
    for name in C_PROGRAMS {
        build_c(&from, name, &into, &[])?;
        tally += Tally::PASSED;
    }
    for name in CONTAINER_PROGRAMS {
        build_c(&from, name, &into.join("container"), &["-static"])?;
        tally += Tally::PASSED;
    }
    for (compiler, name) in DEEP_COMPILERS {
        tally += build_deep(compiler, &into.join(name), &from)?;
    }
    for (compiler, name) in HEAP_COMPILERS {
        tally += build_heap(compiler, &into.join(name), &from)?;
    }
    let source = from.join("rust_burn.rs");
    if is_outdated(&into.join("rust_burn"), std::slice::from_ref(&source)) {
        command::run(
            Command::new("rustc").args(RUST_FLAGS).arg("-o").arg(into.join("rust_burn")).arg(source),
        )?;
    }
    tally += Tally::PASSED;
    if is_outdated(&into.join("goburn"), &[from.join("goburn/main.go"), from.join("goburn/go.mod")]) {
        tools::need(&[GO])?;
        let mut go = Command::new("go");
        go.current_dir(from.join("goburn")).env("GOTOOLCHAIN", "local").env("GOFLAGS", "");
        command::run(go.args(["build", "-trimpath", "-buildvcs=false", "-o"]).arg(into.join("goburn")))?;
    }
    tally += Tally::PASSED;
    Ok(tally)
}

fn build_c(from: &Path, name: &str, into: &Path, flags: &[&str]) -> Result<()> {
    let (source, program) = (from.join(name).with_extension("c"), into.join(name));
    if !is_outdated(&program, &[source.clone(), from.join("burn.h")]) {
        return Ok(());
    }
    tools::need(&[CC])?;
    command::run(Command::new("cc").args(C_FLAGS).args(flags).arg("-o").arg(program).arg(source))
}

fn build_deep(compiler: &str, program: &Path, from: &Path) -> Result<Tally> {
    let source = from.join("deep.c");
    if is_outdated(program, &[source.clone(), from.join("burn.h")]) {
        if Command::new(compiler).arg("--version").output().is_err() {
            eprintln!("SKIP {}: {compiler} is not installed", program.display());
            return Ok(Tally::SKIPPED);
        }
        command::run(Command::new(compiler).args(DEEP_FLAGS).arg("-o").arg(program).arg(source))?;
    }
    Ok(Tally::PASSED)
}

fn build_heap(compiler: &str, program: &Path, from: &Path) -> Result<Tally> {
    let source = from.join("heap_truth.c");
    if is_outdated(program, &[source.clone(), from.join("burn.h")]) {
        if Command::new(compiler).arg("--version").output().is_err() {
            eprintln!("SKIP {}: {compiler} is not installed", program.display());
            return Ok(Tally::SKIPPED);
        }
        let flags = C_FLAGS.into_iter().chain(["-Wno-unused-function"]);
        command::run(Command::new(compiler).args(flags).arg("-o").arg(program).arg(source))?;
    }
    Ok(Tally::PASSED)
}

/// Whether a program is older than one of its sources, or than this program, which holds the flags.
fn is_outdated(program: &Path, sources: &[PathBuf]) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let built = modified(program);
    let xtask = std::env::current_exe().ok().and_then(|path| modified(&path));
    built.is_none() || xtask > built || sources.iter().any(|source| modified(source) > built)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_older_than_its_flags_is_outdated() {
        let xtask = std::env::current_exe().expect("a test has a file");
        // This test's own source is older than the test, and neither is newer than itself.
        let source = project::root().join("xtask/src/testprogs.rs");
        assert!(!is_outdated(&xtask, std::slice::from_ref(&source)));
        assert!(is_outdated(&source, &[]), "older than the flags");
        assert!(is_outdated(&project::root().join("absent"), &[]));
    }
}
