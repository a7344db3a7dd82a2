//! The committed BPF objects: building them, and proving that they are what the sources give.

mod build;
mod inputs;
mod rust_src;
mod rustc;
mod toolchain;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use self::{inputs::Inputs, toolchain::Toolchain};
use crate::{project, sha256, tally::Tally};

pub(crate) use self::{rustc::wrapper, toolchain::cargo as nightly_cargo};

/// The register layouts there are objects for, as `target_arch` names them.
const ARCHES: [&str; 2] = ["x86_64", "aarch64"];
/// Key of rust-src's hash among the recorded tools.
const RUST_SRC: &str = "rust-src";

/// Builds the objects and records what they were built from.
pub(crate) fn build() -> Result<()> {
    let recorded = Inputs::read(&inputs_path()).unwrap_or_default();
    let toolchain = match Toolchain::find(recorded.tools.get(RUST_SRC).map(String::as_str)) {
        Ok(toolchain) => toolchain,
        Err(reason) => {
            println!("not the tool chain of the last build, so all bytes will differ: {reason:#}");
            Toolchain::find(None)?
        }
    };
    let mut inputs = present(Some(&toolchain))?;
    for arch in ARCHES {
        let object = build::object(project::root(), &toolchain, arch)?;
        let path = prebuilt().join(file_name(arch));
        fs::create_dir_all(prebuilt())?;
        fs::write(&path, &object).with_context(|| format!("write {}", path.display()))?;
        println!("{}: {} KiB", path.display(), object.len().div_ceil(1024));
        inputs.objects.insert(file_name(arch), sha256::of_bytes(&object)?);
    }
    fs::write(inputs_path(), inputs.to_string()).context("write inputs.sha256")
}

/// Checks the hashes of all inputs and of the objects, and the objects' bytes where their tool chain can be had.
pub(crate) fn check() -> Result<Tally> {
    let recorded = Inputs::read(&inputs_path())?;
    let mut tally = check_hashes(&recorded)?;
    tally += match Toolchain::find(recorded.tools.get(RUST_SRC).map(String::as_str)) {
        Err(reason) => skip_bytes(&format!("{reason:#}")),
        Ok(toolchain) => check_bytes(&toolchain)?,
    };
    Ok(tally)
}

fn check_hashes(recorded: &Inputs) -> Result<Tally> {
    let mut present = present(None)?;
    if let Some(rust_src) = recorded.tools.get(RUST_SRC) {
        // Known only once there is a tool chain; compared before the bytes are.
        present.tools.insert(RUST_SRC.to_owned(), rust_src.clone());
    }
    for file in ARCHES.map(file_name) {
        let hash = sha256::of_file(&prebuilt().join(&file))?;
        present.objects.insert(file, hash);
    }
    let differences = [
        inputs::differences(&recorded.tools, &present.tools),
        inputs::differences(&recorded.sources, &present.sources),
        inputs::differences(&recorded.objects, &present.objects),
    ]
    .concat();
    if differences.is_empty() {
        println!("ok: BPF objects were built from these {} inputs", recorded.sources.len());
        return Ok(Tally::PASSED);
    }
    differences.iter().for_each(|difference| println!("  {difference}"));
    println!("FAILED: BPF objects were built from other inputs; `cargo xtask build-ebpf` rebuilds them");
    Ok(Tally::FAILED)
}

fn check_bytes(toolchain: &Toolchain) -> Result<Tally> {
    let mut tally = Tally::default();
    for arch in ARCHES {
        let committed = prebuilt().join(file_name(arch));
        let committed = fs::read(&committed).with_context(|| format!("read {}", committed.display()))?;
        let rebuilt = build::object(project::root(), toolchain, arch)?;
        if committed == rebuilt {
            println!("ok: {} is what its sources give, byte for byte", file_name(arch));
            tally += Tally::PASSED;
        } else {
            println!(
                "FAILED: {} is not what its sources give: {} bytes committed, {} rebuilt",
                file_name(arch),
                committed.len(),
                rebuilt.len()
            );
            tally += Tally::FAILED;
        }
    }
    Ok(tally)
}

fn skip_bytes(reason: &str) -> Tally {
    println!("skipped: rebuilding the BPF objects to compare their bytes: {reason}");
    Tally::SKIPPED
}

/// The inputs as they are now; without a tool chain, without what only it tells.
fn present(toolchain: Option<&Toolchain>) -> Result<Inputs> {
    let mut inputs = Inputs { sources: inputs::sources(project::root())?, ..Inputs::default() };
    inputs.tools.extend(toolchain::pinned());
    inputs.tools.insert("flags".to_owned(), build::FLAGS.join(" "));
    if let Some(toolchain) = toolchain {
        inputs.tools.insert(RUST_SRC.to_owned(), toolchain.rust_src.hash.clone());
    }
    Ok(inputs)
}

fn prebuilt() -> PathBuf {
    project::root().join("profiler-ebpf/prebuilt")
}

fn inputs_path() -> PathBuf {
    prebuilt().join("inputs.sha256")
}

fn file_name(arch: &str) -> String {
    format!("profiler-{arch}.bpf.o")
}
