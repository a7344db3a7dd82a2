//! Debian's kernels, fetched once and kept in `target/vm`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{debian::Suite, project};

/// Depends on the newest kernel of a suite. The flavor for virtual machines: what they need is built in.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// The oldest first.
///
/// All mount one hierarchy of control groups only, so that each of both is all there is on some kernel; Debian's 6.12 and
/// later have no memory controller of version 1.
pub(super) const KERNELS: [Kernel; 4] = [
    Kernel { name: "5.10", suite: "bullseye", cgroup: "v1", processors: 1 },
    Kernel { name: "6.1", suite: "bookworm", cgroup: "v2", processors: 1 },
    Kernel { name: "6.12", suite: "trixie", cgroup: "v2", processors: 2 },
    Kernel { name: "sid", suite: "sid", cgroup: "v2", processors: 2 },
];

/// A kernel to test on.
pub(super) struct Kernel {
    /// By which it is chosen: a version, or the suite whose version changes.
    pub(super) name: &'static str,
    suite: &'static str,
    /// Version of the control groups that it mounts.
    pub(super) cgroup: &'static str,
    /// Those that it brings up. Where time is the number of instructions, 5.10 and 6.1 stand still when they start a second
    /// one, 6.12 does not.
    pub(super) processors: u32,
}

/// A kernel on this machine.
pub(super) struct Version {
    pub(super) image: PathBuf,
    /// As `uname -r` gives it.
    pub(super) release: String,
}

impl Kernel {
    /// The one fetched before, or the newest that there is.
    pub(super) fn get(&self, refresh: bool) -> Result<Version> {
        let dir = project::target().join("vm").join(self.name);
        if !refresh && let Some(kept) = kept(&dir) {
            return Ok(kept);
        }
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        }
        self.fetch(&dir).with_context(|| format!("fetch the kernel of {}", self.suite))?;
        kept(&dir).context("no kernel is in its package")
    }

    fn fetch(&self, dir: &Path) -> Result<()> {
        println!("fetching the kernel of Debian {}", self.suite);
        let staging = dir.join("incomplete");
        let suite = Suite::fetch(self.suite, &staging)?;
        let packages = suite.dependencies(PACKAGE)?;
        let image = packages.iter().find(|name| name.starts_with("linux-image-"));
        let image = image.with_context(|| format!("{PACKAGE} depends on no kernel"))?;
        let content = staging.join("content");
        suite.unpack(image, &content)?;
        // From 7.0 on the package only gathers parts, one of which is the kernel.
        if find(&content)?.is_none() {
            let parts = suite.dependencies(image)?;
            let binary = parts.iter().find(|name| name.starts_with("linux-binary-"));
            suite.unpack(binary.with_context(|| format!("no kernel in {image}"))?, &content)?;
        }
        let found = find(&content)?.with_context(|| format!("no kernel in {image}"))?;
        let release = image.trim_start_matches("linux-image-");
        fs::rename(found, dir.join(format!("{PREFIX}{release}"))).context("move the kernel")?;
        fs::remove_dir_all(&staging).with_context(|| format!("remove {}", staging.display()))
    }
}

const PREFIX: &str = "vmlinuz-";

fn kept(dir: &Path) -> Option<Version> {
    fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let release = entry.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned();
        Some(Version { image: entry.path(), release })
    })
}

/// `boot/vmlinuz-RELEASE`, or `usr/lib/modules/RELEASE/vmlinuz` from 7.0 on.
fn find(content: &Path) -> Result<Option<PathBuf>> {
    let files = project::files_under(content)?;
    let is_kernel = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name == "vmlinuz" || name.starts_with(PREFIX)
    };
    Ok(files.into_iter().find(is_kernel).map(|file| content.join(file)))
}
