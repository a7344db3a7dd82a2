//! Memory of this process.

/// Gives free memory of the allocator back to the system: glibc keeps what a thread has freed for its next need, which
/// after a burst of large files never comes.
pub(crate) fn release_free() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer; the allocator locks its own state.
    unsafe {
        libc::malloc_trim(0);
    }
}
