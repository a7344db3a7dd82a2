//! Random bytes from the kernel.

use std::io;

/// `N` random bytes. Source: getrandom(2); up to 256 bytes are never interrupted.
pub(crate) fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= 256) };
    let mut bytes = [0u8; N];
    // SAFETY: the pointer and length are those of `bytes`, which outlives the call.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if filled == N.cast_signed() { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_ids_differ() {
        assert_ne!(super::bytes::<16>().expect("random"), super::bytes::<16>().expect("random"));
    }
}
