//! Many names in little memory, each had by its number.

use std::io;

use zstd::bulk;

/// Names packed together: about 4 KiB, which unpack in some 10 µs to a third of the memory.
const BLOCK_NAMES: usize = 128;
/// Names longer than this are cut: KSYM_NAME_LEN is 512.
const NAME_BYTES_MAX: usize = 1024;
/// The fastest; higher ones gain a tenth.
const LEVEL: i32 = 1;

/// Blocks of names, each ended by a NUL. Numbers go with the order they were given in.
#[derive(Debug, Default)]
pub(super) struct PackedNames {
    blocks: Vec<Box<[u8]>>,
}

impl PackedNames {
    /// Names contain no NUL; what follows one is cut off.
    ///
    /// # Errors
    /// The compressor has no memory.
    pub(super) fn new<'a>(names: impl Iterator<Item = &'a str>) -> io::Result<Self> {
        let mut compressor = bulk::Compressor::new(LEVEL)?;
        let (mut blocks, mut block, mut count) = (Vec::new(), Vec::new(), 0);
        for name in names {
            let name = name.split('\0').next().unwrap_or_default();
            block.extend_from_slice(&name.as_bytes()[..name.floor_char_boundary(NAME_BYTES_MAX)]);
            block.push(0);
            count += 1;
            if count == BLOCK_NAMES {
                blocks.push(compressor.compress(&block)?.into_boxed_slice());
                block.clear();
                count = 0;
            }
        }
        if count > 0 {
            blocks.push(compressor.compress(&block)?.into_boxed_slice());
        }
        blocks.shrink_to_fit();
        Ok(Self { blocks })
    }

    /// The name with a number; `None` where there is none.
    pub(super) fn get(&self, number: usize) -> Option<String> {
        let block = self.blocks.get(number / BLOCK_NAMES)?;
        let names = bulk::decompress(block, BLOCK_NAMES * (NAME_BYTES_MAX + 1)).ok()?;
        // Behind the last NUL is nothing.
        let (names, _) = names.split_at(names.len().checked_sub(1)?);
        let name = names.split(|&byte| byte == 0).nth(number % BLOCK_NAMES)?;
        String::from_utf8(name.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_had_by_its_number_and_no_other() {
        let names: Vec<_> = (0..1000).map(|number| format!("__x64_sys_{number}")).collect();
        let packed = PackedNames::new(names.iter().map(String::as_str)).expect("memory");
        for (number, name) in names.iter().enumerate() {
            assert_eq!(packed.get(number).as_ref(), Some(name));
        }
        assert_eq!((packed.get(1000), packed.get(5000)), (None, None));
        let bytes: usize = packed.blocks.iter().map(|block| block.len()).sum();
        assert!(bytes < names.iter().map(String::len).sum::<usize>() / 2, "{bytes}");
    }

    #[test]
    fn names_that_are_none_keep_their_number() {
        let long = "é".repeat(NAME_BYTES_MAX);
        let packed = PackedNames::new(["", &long, "a\0b", "last"].into_iter()).expect("memory");
        let got: Vec<_> = (0..5).map(|number| packed.get(number)).collect();
        let cut = Some(long[..NAME_BYTES_MAX].to_owned());
        assert_eq!(got, [Some(String::new()), cut, Some("a".into()), Some("last".into()), None]);
    }
}
