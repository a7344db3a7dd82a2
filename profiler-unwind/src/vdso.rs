//! The vDSO: an ELF image that the kernel maps into every process and that no file holds.

use crate::table::UnwindTable;
use crate::{UnwindError, from_elf, limits};

/// Makes the unwind table of a vDSO from its image, as read from a process's `[vdso]` mapping.
///
/// # Errors
///
/// As [`from_elf`], and for images larger than [`limits::VDSO_BYTES_MAX`].
pub fn from_image(image: &[u8]) -> Result<UnwindTable, UnwindError> {
    if image.len() > limits::VDSO_BYTES_MAX {
        return Err(UnwindError::VdsoTooLarge { bytes: image.len(), max: limits::VDSO_BYTES_MAX });
    }
    from_elf(image)
}
