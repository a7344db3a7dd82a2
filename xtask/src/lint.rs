//! Checks of the sources as they are written: format, lints, documentation, licences.

use anyhow::Result;

use crate::{command, fuzz, tally::Tally, tools};

/// Sources outside the workspace that rustfmt covers too.
const OTHER_SOURCES: [&str; 2] = ["testprogs/rust_burn.rs", "testprogs/rust_deep.rs"];

pub(crate) fn format() -> Result<Tally> {
    command::run(command::cargo().args(["fmt", "--all", "--check"]))?;
    for manifest in ["profiler-ebpf/Cargo.toml", "fuzz/Cargo.toml"] {
        command::run(command::cargo().args(["fmt", "--manifest-path", manifest, "--check"]))?;
    }
    let mut rustfmt = std::process::Command::new("rustfmt");
    rustfmt.current_dir(crate::project::root()).args(["--edition", "2024", "--check"]);
    command::run(rustfmt.args(OTHER_SOURCES))?;
    Ok(Tally::PASSED)
}

pub(crate) fn clippy() -> Result<Tally> {
    let arguments = ["clippy", "--release", "--workspace", "--all-targets", "--locked", "--", "-Dwarnings"];
    command::run(command::cargo().args(arguments))?;
    fuzz::check()?;
    Ok(Tally::PASSED)
}

pub(crate) fn docs() -> Result<Tally> {
    let mut cargo = command::cargo();
    cargo
        .args(["doc", "--release", "--workspace", "--no-deps", "--locked"])
        .env("RUSTDOCFLAGS", "-Dwarnings");
    command::run(&mut cargo)?;
    Ok(Tally::PASSED)
}

/// Licences, duplicates and sources of every crate: the workspace's, and those that the BPF programs are built from.
pub(crate) fn deny() -> Result<Tally> {
    let program = tools::cargo_deny()?;
    for manifest in ["Cargo.toml", "profiler-ebpf/Cargo.toml"] {
        let mut deny = std::process::Command::new(&program);
        deny.current_dir(crate::project::root()).args(["--config", "deny.toml", "--manifest-path", manifest]);
        deny.args(["check", "--hide-inclusion-graph", "licenses", "bans", "sources"]);
        command::run(&mut deny)?;
    }
    Ok(Tally::PASSED)
}
