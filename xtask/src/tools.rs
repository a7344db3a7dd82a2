//! Programs that the checks need and a machine may lack: installed by apt-get where that is possible, else named.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{command, project};

/// The licence checker; its configuration file is `deny.toml`.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// Something that Debian has a package of.
pub(crate) struct Tool {
    name: &'static str,
    package: &'static str,
    is_there: fn() -> bool,
}

pub(crate) const CC: Tool = Tool { name: "cc", package: "gcc", is_there: || command::is_installed("cc") };
pub(crate) const CLANG: Tool =
    Tool { name: "clang", package: "clang", is_there: || command::is_installed("clang") };
/// Brings the C library's headers for aarch64 with it.
pub(crate) const CC_AARCH64: Tool = Tool {
    name: "aarch64-linux-gnu-gcc",
    package: "crossbuild-essential-arm64",
    is_there: || command::is_installed("aarch64-linux-gnu-gcc"),
};
pub(crate) const MUSL: Tool =
    Tool { name: "musl-gcc", package: "musl-tools", is_there: || command::is_installed("musl-gcc") };
pub(crate) const GO: Tool = Tool { name: "go", package: "golang", is_there: || command::is_installed("go") };
pub(crate) const NODE: Tool =
    Tool { name: "node", package: "nodejs", is_there: || command::is_installed("node") };
pub(crate) const NPM: Tool = Tool { name: "npm", package: "npm", is_there: || command::is_installed("npm") };
pub(crate) const CHROMIUM: Tool =
    Tool { name: "chromium", package: "chromium", is_there: || command::is_installed("chromium") };
/// Comes with runc, which may be outside an ordinary user's path.
pub(crate) const CONTAINERD: Tool = Tool {
    name: "containerd",
    package: "containerd",
    is_there: || command::is_installed("containerd") && command::is_installed("ctr"),
};
/// What the agent's cost is compared with.
pub(crate) const PERF: Tool =
    Tool { name: "perf", package: "linux-perf", is_there: || command::is_installed("perf") };
/// What heap profiles' cost is compared with.
pub(crate) const HEAPTRACK: Tool =
    Tool { name: "heaptrack", package: "heaptrack", is_there: || command::is_installed("heaptrack") };
pub(crate) const BPFTRACE: Tool =
    Tool { name: "bpftrace", package: "bpftrace", is_there: || command::is_installed("bpftrace") };
/// Allocators whose heaps the tests profile.
pub(crate) const JEMALLOC: Tool =
    Tool { name: "jemalloc", package: "libjemalloc2", is_there: || has_library("libjemalloc.so.2") };
pub(crate) const TCMALLOC: Tool = Tool {
    name: "tcmalloc",
    package: "libtcmalloc-minimal4",
    is_there: || has_library("libtcmalloc_minimal.so.4"),
};
pub(crate) const MIMALLOC: Tool =
    Tool { name: "mimalloc", package: "libmimalloc2.0", is_there: || has_library("libmimalloc.so.2.0") };
pub(crate) const QEMU: Tool = Tool {
    name: "qemu-system-x86_64",
    package: "qemu-system-x86",
    is_there: || command::is_installed("qemu-system-x86_64"),
};
/// The virtual machines' shell.
pub(crate) const BUSYBOX: Tool = Tool {
    name: "a static busybox",
    package: "busybox-static",
    is_there: || command::is_installed("busybox"),
};
pub(crate) const LIBPYTHON: Tool =
    Tool { name: "a shared libpython3", package: "libpython3-dev", is_there: has_libpython };

/// Makes sure that all `tools` are there, or fails with the one command that gets them.
pub(crate) fn need(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| !(tool.is_there)()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.iter().map(|tool| tool.name).collect::<Vec<_>>().join(", ");
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    if !command::is_root() || !command::is_installed("apt-get") {
        bail!("missing: {names}; on Debian: apt-get install {}", packages.join(" "));
    }
    println!("installing {names}");
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive");
        command::run(apt.args(["install", "-qq", "-y", "--no-install-recommends"]).args(&packages))
    };
    // The first try fails on a machine that has not seen its package lists yet.
    if install().is_err() {
        command::run(Command::new("apt-get").args(["-qq", "update"]))?;
        install()?;
    }
    let still = missing.iter().find(|tool| !(tool.is_there)());
    still.map_or(Ok(()), |tool| bail!("{} is missing though {} is installed", tool.name, tool.package))
}

/// The same of tools without which some tests or cases are skipped by name: says which cannot be had.
pub(crate) fn want(tools: &[Tool]) {
    for tool in tools {
        if let Err(error) = need(std::slice::from_ref(tool)) {
            eprintln!("going on without {}: {error:#}", tool.name);
        }
    }
}

/// cargo-deny in the pinned version, installed in `target/tools` when it is not there.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    let program = project::tools().join("bin/cargo-deny");
    let version = command::probe(Command::new(&program).arg("--version")).unwrap_or_default();
    if version.split_whitespace().nth(1) != Some(CARGO_DENY_VERSION) {
        let mut install = command::cargo();
        install.args(["install", "cargo-deny", "--version", CARGO_DENY_VERSION, "--locked", "--root"]);
        // The environment of the running cargo would choose the folder of this build too.
        install.arg(project::tools()).env_remove("CARGO_TARGET_DIR");
        command::run(&mut install).context("install cargo-deny")?;
    }
    Ok(program)
}

/// Whether the dynamic linker's folder for Debian's packages on x86-64 has a library.
fn has_library(name: &str) -> bool {
    Path::new("/usr/lib/x86_64-linux-gnu").join(name).exists()
}

/// Whether a development package's link to a shared libpython is in a folder of libraries.
fn has_libpython() -> bool {
    let dirs = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib"];
    dirs.iter().flat_map(fs::read_dir).flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libpython3.") && name.ends_with(".so")
    })
}
