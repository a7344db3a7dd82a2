//! `cargo xtask dist`: one archive with the released programs and its checksum, in `target/dist`.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{command, project, sha256};

/// Programs that a release holds.
const PROGRAMS: [&str; 2] = ["profiler-agent", "profiler-backend"];

/// Papers that go with the programs, as paths below the checkout's top.
const PAPERS: [&str; 5] =
    ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT", "profiler-ebpf/LICENSE-GPL-2.0"];

pub(crate) fn build() -> Result<()> {
    let mut cargo = command::cargo();
    cargo.args(["build", "--profile", "dist", "--locked"]);
    PROGRAMS.iter().for_each(|program| {
        cargo.args(["--package", program]);
    });
    command::run(cargo.env("CARGO_PROFILE_DIST_STRIP", "symbols"))?;
    let name = format!("profiler-{}-linux-{}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
    // Also where cargo puts what it builds with this profile.
    let dist = project::target().join("dist");
    let content = dist.join(&name);
    if content.exists() {
        fs::remove_dir_all(&content).with_context(|| format!("remove {}", content.display()))?;
    }
    fs::create_dir_all(&content).with_context(|| format!("create {}", content.display()))?;
    let programs = PROGRAMS.map(|program| dist.join(program));
    for file in programs.into_iter().chain(PAPERS.map(|paper| project::root().join(paper))) {
        let file_name = file.file_name().expect("every path above ends in a name");
        fs::copy(&file, content.join(file_name)).with_context(|| format!("copy {}", file.display()))?;
    }
    let archive = format!("{name}.tar.gz");
    command::run(
        Command::new("tar")
            .current_dir(&dist)
            .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime"])
            .arg(format!("@{}", commit_time()))
            .args(["-czf", &archive, &name]),
    )?;
    let hash = sha256::of_file(&dist.join(&archive))?;
    fs::write(dist.join("SHA256SUMS"), format!("{hash}  {archive}\n")).context("write SHA256SUMS")?;
    println!("{}", dist.join(archive).display());
    Ok(())
}

/// Seconds since 1970 of the commit that is packed, so that packing it again gives the same archive; 0 outside git.
fn commit_time() -> String {
    let mut git = Command::new("git");
    git.current_dir(project::root()).args(["log", "-1", "--format=%ct"]);
    command::probe(&mut git).map_or_else(|| "0".to_owned(), |time| time.trim().to_owned())
}
