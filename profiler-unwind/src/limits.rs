//! What one file may cost, whatever it says of itself.

/// Code of one file, in bytes from the first to the last: rows hold 32-bit offsets. The largest real ones have 0.2 GiB.
pub const CODE_BYTES_MAX: u64 = u32::MAX as u64 - 1;

/// Frame description entries of one file, 16 bytes each while the table is built. libLLVM has 161,000, Chromium under
/// a million.
pub const FDES_MAX: usize = 2 << 20;

/// Rows of one file before equal neighbors are merged, 8 bytes each while the table is built. libLLVM has 1.3 million.
pub const ROWS_MAX: usize = 8 << 20;

/// Distinct rules of one file. libLLVM has 760.
pub const RULES_PER_FILE_MAX: usize = 4096;

/// Distinct rules of all files together: the size of the kernel's rule map. 510 shared libraries have 3,600.
pub const RULES_MAX: usize = 16_384;

/// Bytes of call frame instructions that are evaluated for one file; the CIE's count once for every FDE that refers to
/// it. libLLVM needs 16 MB. A byte costs about 5 ns.
pub const WORK_BYTES_MAX: u64 = 256 << 20;

/// CIEs kept while a file is read. Real files have a dozen; those beyond are parsed again for every FDE.
pub const CIES_MAX: usize = 1024;

/// Image of a vDSO, in bytes. Real ones have 8 KiB.
pub const VDSO_BYTES_MAX: usize = 1 << 20;

/// Symbols of one file that are looked at for functions whose frames are known. libLLVM has 190,000.
pub const SYMBOLS_MAX: usize = 1 << 20;

/// Such functions are no larger, in bytes: names of others are not read.
pub const KNOWN_FUNCTION_BYTES_MAX: u64 = 512;
