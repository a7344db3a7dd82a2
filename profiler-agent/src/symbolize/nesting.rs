//! How deep DWARF nests, looked at before a parser that recurses does.

use std::fs::File;
use std::io::{self, Read};

use gimli::{Abbreviations, DebugAbbrev, DebugAbbrevOffset, DebugInfo, EndianSlice, NativeEndian};

use super::inflate;
use crate::executable::SymbolSections;

/// Deepest nesting of entries that is passed on: scopes, and one or two per inlined call. Compilers stay far below; the
/// stack of a symbolizer thread takes a hundred thousand.
const DEPTH_MAX: isize = 4096;

/// Bytes of one unit.
const UNIT_BYTES_MAX: u64 = 256 << 20;

/// Bytes of all abbreviations.
const ABBREVIATIONS_BYTES_MAX: u64 = 64 << 20;

/// Whether a file's debug information nests no deeper than it is safe to follow. Reads all of it once, a unit at a time:
/// a quarter of a second for 100 MB. False too for what cannot be read.
pub(super) fn is_bounded(file: &File, symbols: &SymbolSections) -> bool {
    let ([info], [abbreviations]) = (symbols.info.as_slice(), symbols.abbreviations.as_slice()) else {
        return false;
    };
    let bounded = || {
        let mut abbreviation_bytes = Vec::new();
        read_bounded(
            &mut *inflate::read(file, abbreviations)?,
            ABBREVIATIONS_BYTES_MAX,
            &mut abbreviation_bytes,
        )?;
        units_are_bounded(&mut *inflate::read(file, info)?, &abbreviation_bytes)
    };
    bounded().unwrap_or(false)
}

fn units_are_bounded(info: &mut dyn Read, abbreviations: &[u8]) -> io::Result<bool> {
    let abbreviations = DebugAbbrev::new(abbreviations, NativeEndian);
    let mut known: Option<(DebugAbbrevOffset, Abbreviations)> = None;
    let mut unit = Vec::new();
    while next_unit(info, &mut unit)? {
        if !unit_is_bounded(&unit, &abbreviations, &mut known).map_err(io::Error::other)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `known` are the abbreviations of the unit before: neighbors often share them.
fn unit_is_bounded(
    unit: &[u8],
    abbreviations: &DebugAbbrev<EndianSlice<'_, NativeEndian>>,
    known: &mut Option<(DebugAbbrevOffset, Abbreviations)>,
) -> gimli::Result<bool> {
    let info = DebugInfo::from(EndianSlice::new(unit, NativeEndian));
    let Some(header) = info.units().next()? else { return Ok(true) };
    let offset = header.debug_abbrev_offset();
    let (_, shared) = match known.take() {
        Some(before) if before.0 == offset => known.insert(before),
        _ => known.insert((offset, abbreviations.abbreviations(offset)?)),
    };
    let mut entries = header.entries_raw(shared, None)?;
    while !entries.is_empty() {
        if let Some(abbreviation) = entries.read_abbreviation()? {
            entries.skip_attributes(abbreviation.attributes())?;
        }
        if entries.next_depth() > DEPTH_MAX {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reads the next unit with its length in front; false at the end of the section.
///
/// Source: DWARF 5 §7.4: a length of 0xffff_ffff is followed by one of 64 bits.
fn next_unit(info: &mut dyn Read, unit: &mut Vec<u8>) -> io::Result<bool> {
    unit.clear();
    info.take(4).read_to_end(unit)?;
    if unit.is_empty() {
        return Ok(false);
    }
    let mut length = u64::from(u32::from_ne_bytes(whole(unit)?));
    if length == u64::from(u32::MAX) {
        let mut long = Vec::with_capacity(8);
        info.take(8).read_to_end(&mut long)?;
        length = u64::from_ne_bytes(whole(&long)?);
        unit.append(&mut long);
    }
    read_bounded(info, length.min(UNIT_BYTES_MAX + 1), unit)?;
    Ok(true)
}

fn whole<const N: usize>(bytes: &[u8]) -> io::Result<[u8; N]> {
    bytes.try_into().map_err(|_| io::ErrorKind::UnexpectedEof.into())
}

/// Appends at most `bytes_max`; more than a unit may have is an error.
fn read_bounded(from: &mut dyn Read, bytes_max: u64, to: &mut Vec<u8>) -> io::Result<()> {
    let read = from.take(bytes_max).read_to_end(to)?;
    if read as u64 > UNIT_BYTES_MAX { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 unit, 2 with children, 3 without; none has attributes.
    const ABBREVIATIONS: &[u8] = &[1, 0x11, 1, 0, 0, 2, 0x1d, 1, 0, 0, 3, 0x1d, 0, 0, 0, 0];

    /// A DWARF 4 unit: `deep` entries in each other, then `flat` beside each other.
    fn unit(deep: usize, flat: usize) -> Vec<u8> {
        let mut body = vec![4, 0, 0, 0, 0, 0, 8, 1];
        body.extend(std::iter::repeat_n(2, deep).chain(std::iter::repeat_n(0, deep)));
        body.extend(std::iter::repeat_n(3, flat).chain([0]));
        [u32::try_from(body.len()).unwrap().to_ne_bytes().as_slice(), &body].concat()
    }

    #[track_caller]
    fn check(units: &[Vec<u8>], expect: Option<bool>) {
        let info = units.concat();
        assert_eq!(units_are_bounded(&mut info.as_slice(), ABBREVIATIONS).ok(), expect);
    }

    #[test]
    fn deep_nesting_is_refused_in_any_unit_and_width_is_not() {
        check(&[], Some(true));
        check(&[unit(100, 100_000)], Some(true));
        check(&[unit(4095, 0), unit(10, 10)], Some(true));
        check(&[unit(10, 10), unit(4096, 0)], Some(false));
        check(&[unit(10, 10), unit(1_000_000, 0)], Some(false));
    }

    #[test]
    fn what_is_cut_or_unknown_is_an_error_and_no_panic() {
        let whole = unit(10, 10);
        for cut in 1..whole.len() - 1 {
            check(&[whole[..cut].to_vec()], None);
        }
        check(&[vec![0xff; 12]], None);
        check(&[[4u32.to_ne_bytes(), [9, 0, 0, 0]].concat()], None);
    }
}
