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
    tools::{self, CC, CLANG, GO, MUSL},
};

const C_PROGRAMS: [&str; 6] = ["burn", "short", "fork_storm", "identity", "crowd", "map_code"];

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
const UNFRAMED_FLAGS: [&str; 6] = ["-Wall", "-Wextra", "-Werror", "-O2", "-g1", "-fomit-frame-pointer"];

/// A program without frame pointers, by the compiler that makes it.
struct Unframed {
    name: &'static str,
    compiler: &'static str,
    source: &'static str,
    flags: &'static [&'static str],
}

/// A build id that two programs claim to be theirs.
const CLAIMED: &str = "-Wl,--build-id=0xc1a1c1a1c1a1c1a1c1a1c1a1c1a1c1a1c1a1c1a1";

/// Those whose compiler is not installed are skipped.
const UNFRAMED: [Unframed; 20] = [
    Unframed { name: "deep_gcc", compiler: "gcc", source: "deep.c", flags: &[] },
    Unframed { name: "deep_clang", compiler: "clang", source: "deep.c", flags: &[] },
    Unframed { name: "recurse", compiler: "gcc", source: "recurse.c", flags: &[] },
    Unframed { name: "fork_storm_unframed", compiler: "gcc", source: "fork_storm.c", flags: &[] },
    Unframed { name: "deep_static", compiler: "gcc", source: "deep.c", flags: &["-static"] },
    Unframed { name: "deep_static_pie", compiler: "gcc", source: "deep.c", flags: &["-static-pie"] },
    Unframed { name: "deep_musl", compiler: "musl-gcc", source: "deep.c", flags: &["-static", "-DOWN_SORT"] },
    Unframed { name: "deep_musl_qsort", compiler: "musl-gcc", source: "deep.c", flags: &["-static"] },
    Unframed { name: "throw_gcc", compiler: "g++", source: "throw.cpp", flags: &[] },
    Unframed { name: "throw_clang", compiler: "clang++", source: "throw.cpp", flags: &[] },
    Unframed { name: "leak", compiler: "g++", source: "leak.cpp", flags: &[] },
    Unframed { name: "heap_pairs", compiler: "gcc", source: "heap_pairs.c", flags: &[] },
    Unframed { name: "grow", compiler: "gcc", source: "grow.c", flags: &[] },
    Unframed { name: "depth", compiler: "gcc", source: "depth.c", flags: &[] },
    Unframed { name: "shapes", compiler: "gcc", source: "shapes.c", flags: &["-ldl"] },
    Unframed { name: "forger", compiler: "gcc", source: "claim.c", flags: &["-DHOT=poison_hot", CLAIMED] },
    Unframed { name: "victim", compiler: "gcc", source: "claim.c", flags: &["-DHOT=honest_hot", CLAIMED] },
    // Two versions whose frames differ: a table of the one is wrong for the other.
    Unframed {
        name: "libplugin_1.so",
        compiler: "gcc",
        source: "plugin.c",
        flags: &["-shared", "-fPIC", "-DVERSION=1"],
    },
    Unframed {
        name: "libplugin_2.so",
        compiler: "gcc",
        source: "plugin.c",
        flags: &["-shared", "-fPIC", "-DVERSION=2"],
    },
    Unframed {
        name: "libheap_plugin.so",
        compiler: "gcc",
        source: "heap_plugin.c",
        flags: &["-shared", "-fPIC"],
    },
];

/// Programs that allocate: compiler, source and name. One is linked with musl. Not installed: skipped.
const HEAP_PROGRAMS: [(&str, &str, &str); 3] = [
    ("cc", "heap_truth.c", "heap_truth"),
    ("musl-gcc", "heap_truth.c", "heap_truth_musl"),
    ("cc", "heap_life.c", "heap_life"),
];

const RUST_FLAGS: [&str; 4] = ["--edition=2024", "-O", "-Cdebuginfo=1", "-Dwarnings"];

const RUST_PROGRAMS: [(&str, &[&str]); 2] =
    [("rust_burn", &["-Cforce-frame-pointers=yes"]), ("rust_deep", &[])];

/// A Go program, its folder, and flags of its build.
const GO_PROGRAMS: [(&str, &str, &[&str]); 3] = [
    ("goburn", "goburn", &[]),
    ("goburn_stripped", "goburn", &["-ldflags=-s -w"]),
    ("cgoburn", "cgoburn", &[]),
];

/// Builds those programs whose sources or flags are newer than they are; counts each that is there.
pub(crate) fn build() -> Result<Tally> {
    let into = project::target().join("testprogs");
    fs::create_dir_all(into.join("container")).with_context(|| format!("create {}", into.display()))?;
    let from = project::root().join("testprogs");
    if let Err(error) = tools::need(&[CLANG, MUSL]) {
        println!("{error:#}: their programs are left out");
    }
    let mut tally = Tally::default();
    for name in C_PROGRAMS {
        build_c(&from, name, &into, &[])?;
        tally += Tally::PASSED;
    }
    for name in CONTAINER_PROGRAMS {
        build_c(&from, name, &into.join("container"), &["-static"])?;
        tally += Tally::PASSED;
    }
    for program in &UNFRAMED {
        tally += build_unframed(program, &into, &from)?;
    }
    for (compiler, source, name) in HEAP_PROGRAMS {
        tally += build_heap(compiler, &from.join(source), &into.join(name))?;
    }
    for (name, flags) in RUST_PROGRAMS {
        build_rust(&from, name, &into, flags)?;
        tally += Tally::PASSED;
    }
    for (name, folder, flags) in GO_PROGRAMS {
        build_go(&from.join(folder), &into.join(name), flags)?;
        tally += Tally::PASSED;
    }
    tally += build_java(&from, &into)?;
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

fn build_unframed(program: &Unframed, into: &Path, from: &Path) -> Result<Tally> {
    let &Unframed { name, compiler, source, flags } = program;
    let (source, program) = (from.join(source), into.join(name));
    if !is_outdated(&program, &[source.clone(), from.join("burn.h")]) {
        return Ok(Tally::PASSED);
    }
    if !command::is_installed(compiler) {
        return Ok(skip(name, compiler));
    }
    let language: &[&str] = match source.extension().and_then(|extension| extension.to_str()) {
        Some("cpp") => &["-std=c++17"],
        _ => &["-std=gnu11", "-Wno-unused-function", "-fasynchronous-unwind-tables"],
    };
    let mut compile = Command::new(compiler);
    compile.args(UNFRAMED_FLAGS).args(language).arg("-pthread").arg("-o").arg(program).arg(source);
    command::run(compile.args(flags))?;
    Ok(Tally::PASSED)
}

fn build_heap(compiler: &str, source: &Path, program: &Path) -> Result<Tally> {
    if is_outdated(program, &[source.to_path_buf(), source.with_file_name("burn.h")]) {
        if !command::is_installed(compiler) {
            return Ok(skip(&program.display().to_string(), compiler));
        }
        let flags = C_FLAGS.into_iter().chain(["-Wno-unused-function"]);
        command::run(Command::new(compiler).args(flags).arg("-o").arg(program).arg(source))?;
    }
    Ok(Tally::PASSED)
}

fn build_rust(from: &Path, name: &str, into: &Path, flags: &[&str]) -> Result<()> {
    let (source, program) = (from.join(name).with_extension("rs"), into.join(name));
    if !is_outdated(&program, std::slice::from_ref(&source)) {
        return Ok(());
    }
    command::run(Command::new("rustc").args(RUST_FLAGS).args(flags).arg("-o").arg(program).arg(source))
}

fn build_go(folder: &Path, program: &Path, flags: &[&str]) -> Result<()> {
    if !is_outdated(program, &[folder.join("main.go"), folder.join("go.mod")]) {
        return Ok(());
    }
    tools::need(&[GO, CC])?;
    let mut go = Command::new("go");
    go.current_dir(folder).env("GOTOOLCHAIN", "local").env("GOFLAGS", "");
    go.args(["build", "-trimpath", "-buildvcs=false"]).args(flags);
    command::run(go.arg("-o").arg(program))
}

fn build_java(from: &Path, into: &Path) -> Result<Tally> {
    let (source, program) = (from.join("Burn.java"), into.join("Burn.class"));
    if !is_outdated(&program, std::slice::from_ref(&source)) {
        return Ok(Tally::PASSED);
    }
    if !command::is_installed("javac") {
        return Ok(skip("Burn.class", "javac"));
    }
    command::run(Command::new("javac").arg("-d").arg(into).arg(source))?;
    Ok(Tally::PASSED)
}

fn skip(program: &str, tool: &str) -> Tally {
    eprintln!("SKIP {program}: {tool} is not installed");
    Tally::SKIPPED
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
