//! Getting the privileges that sampling every process needs, or saying which are missing.

use std::{
    env,
    io::{self, IsTerminal as _},
    os::unix::process::CommandExt as _,
    process::Command,
};

use anyhow::{Context as _, bail};
use tracing::warn;

use crate::sys::capabilities::{self, Capability};

/// Set for the child of `sudo`, so that a sudo that gives no privileges is not asked for ever.
const UNDER_SUDO: &str = "PROFILER_UNDER_SUDO";

/// Returns when the privileges are there that nothing works without. Else, with a terminal to type a password at, becomes
/// `sudo` with the same arguments; without one, an error that names what is missing. Gives what is missing besides.
pub(crate) fn acquire() -> anyhow::Result<Vec<Capability>> {
    let missing = capabilities::missing().context("read own capabilities")?;
    if !missing.iter().any(|capability| capability.is_needed()) {
        return Ok(missing);
    }
    let names = missing.iter().map(Capability::to_string).collect::<Vec<_>>().join(", ");
    if !io::stdin().is_terminal() || env::var_os(UNDER_SUDO).is_some() {
        bail!(
            "sampling every process needs {names}: run as root (sudo), or give the container these capabilities"
        );
    }
    eprintln!("sampling every process needs {names}: asking sudo");
    let error = sudo()?.exec();
    Err(error).context("run sudo (is it installed?)")
}

/// Says what the agent must do without. The limit of locked memory matters on old kernels only, where loading says so.
pub(crate) fn tell(missing: &[Capability]) {
    for capability in missing.iter().filter(|&&capability| capability != Capability::SysResource) {
        warn!("no {capability}: without {}", capability.gives());
    }
}

/// `sudo --preserve-env=PROFILER_… this-program the-same-arguments`
fn sudo() -> anyhow::Result<Command> {
    let program = env::current_exe().context("find own executable")?;
    let own_variables = env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let mut preserved: Vec<_> = own_variables.filter(|name| name.starts_with("PROFILER_")).collect();
    preserved.push(UNDER_SUDO.to_owned());
    let mut command = Command::new("sudo");
    command
        .env(UNDER_SUDO, "1")
        .arg(format!("--preserve-env={}", preserved.join(",")))
        .arg("--")
        .arg(program)
        .args(env::args_os().skip(1));
    Ok(command)
}

/// Makes a command run as the user who asked sudo, where it was us who did: nobody asked for it to run as root.
pub(crate) fn give_back(command: &mut Command) {
    let id = |name| env::var(name).ok()?.parse::<u32>().ok();
    if env::var_os(UNDER_SUDO).is_some()
        && let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID"))
    {
        command.uid(user).gid(group);
    }
}
