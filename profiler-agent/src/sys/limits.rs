//! Resource limits of this process.

use std::io;

/// Raises the limit of open files to what the system allows, and gives it: executables stay open while windows need
/// them. Source: getrlimit(2), RLIMIT_NOFILE.
pub(crate) fn raise_open_files() -> io::Result<u64> {
    let mut limit = get(libc::RLIMIT_NOFILE)?;
    limit.rlim_cur = limit.rlim_max;
    set(libc::RLIMIT_NOFILE, limit)?;
    Ok(limit.rlim_cur)
}

/// Lifts the limit of locked memory, which maps count against before kernel 5.11. Fails without CAP_SYS_RESOURCE; then
/// the maps must fit.
pub(crate) fn lift_locked_memory() -> io::Result<()> {
    set(libc::RLIMIT_MEMLOCK, libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY })
}

fn get(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit that outlives the call.
    let status = unsafe { libc::getrlimit(resource, &raw mut limit) };
    if status == 0 { Ok(limit) } else { Err(io::Error::last_os_error()) }
}

fn set(resource: libc::__rlimit_resource_t, limit: libc::rlimit) -> io::Result<()> {
    // SAFETY: `limit` is a valid rlimit that outlives the call.
    let status = unsafe { libc::setrlimit(resource, &raw const limit) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn open_files_can_be_raised_to_what_is_allowed() {
        assert!(super::raise_open_files().expect("own limit") > 0);
    }
}
