//! Memory of this process.

/// Bounds what the allocator keeps for itself. To be called before the first thread is started.
///
/// glibc gives each thread an arena of its own and raises the size from which memory is mapped, and unmapped when it is
/// freed, with each larger piece that is freed: buffers of megabytes then stay where a thread needed one once.
pub(crate) fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    for (option, value) in
        [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 128 << 10), (libc::M_TRIM_THRESHOLD, 256 << 10)]
    {
        // SAFETY: takes two integers; the allocator locks its own state.
        let accepted = unsafe { libc::mallopt(option, value) };
        debug_assert_eq!(accepted, 1, "option {option}");
    }
}

/// Gives free memory of the allocator back to the system: glibc keeps what a thread has freed for its next need, which
/// after a burst of large files never comes.
pub(crate) fn release_free() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer; the allocator locks its own state.
    unsafe {
        libc::malloc_trim(0);
    }
}
