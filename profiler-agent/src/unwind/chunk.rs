//! Mappings of a process and tables of its executables to the records that the kernel side searches.

use std::{ops::Range, sync::Arc};

use profiler_common::unwind::mappings::{
    CHUNK_RECORDS, MappingChunk, MappingRecord, NO_DIRECTORY, UNUSED_START,
};

/// The code of one directory, by the addresses of the ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) addresses: Range<u64>,
    pub(super) directory: u32,
}

/// The table of what is mapped somewhere.
#[derive(Clone, Debug)]
pub(super) struct MappedTable {
    /// What is added to an ELF address to get that of the process, modulo 2^64.
    pub(super) bias: u64,
    /// Ascending and disjoint.
    pub(super) parts: Arc<[Part]>,
}

/// One executable range of a process.
#[derive(Clone, Debug)]
pub(super) struct CodeRange {
    pub(super) addresses: Range<u64>,
    /// `None` for code that has no table.
    pub(super) table: Option<MappedTable>,
}

/// One record with its start.
pub(super) type Record = (u64, MappingRecord);

/// The records of a process, ascending. The vsyscall page, which lies above all user addresses and in the way of the
/// search, is left out. Ranges are split where another directory begins; neighbors without a table are
/// one record. `None` where they are more than a chunk holds.
///
/// ```text
/// mapping   ├──────────────────────────────┤
/// parts       ├─ directory 3 ─┼─ 4 ─┤
/// records   ├─┼───────────────┼─────┼──────┤   what no part covers has no directory
/// ```
pub(super) fn records(ranges: &[CodeRange]) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    ranges.iter().for_each(|range| push_range(&mut records, range));
    (records.len() <= CHUNK_RECORDS).then_some(records)
}

/// The records with those of one more range, which takes the place of what they had there. They may be more than a chunk
/// holds.
pub(super) fn with(records: &[Record], range: &CodeRange) -> Vec<Record> {
    let Range { start, end } = range.addresses;
    let mut merged = Vec::with_capacity(records.len() + 2);
    for &(from, record) in records.iter().filter(|(from, _)| *from < start) {
        push(&mut merged, (from, MappingRecord { end: record.end.min(start), ..record }));
    }
    push_range(&mut merged, range);
    for &(from, record) in records.iter().filter(|(_, record)| record.end > end) {
        push(&mut merged, (from.max(end), record));
    }
    merged
}

fn push_range(records: &mut Vec<Record>, CodeRange { addresses, table }: &CodeRange) {
    if addresses.end > UNUSED_START {
        return;
    }
    let mut at = addresses.start;
    for piece in table.iter().flat_map(|table| pieces(table, addresses)) {
        push(records, without_table(at..piece.0));
        at = piece.1.end;
        push(records, piece);
    }
    push(records, without_table(at..addresses.end));
}

/// The parts of a table inside a range.
fn pieces<'a>(table: &'a MappedTable, range: &'a Range<u64>) -> impl Iterator<Item = Record> {
    table.parts.iter().filter_map(|part| {
        let bias = table.bias.wrapping_add(part.addresses.start);
        // A part that wraps around the end of the address space is none of this process.
        let end = bias.checked_add(part.addresses.end.wrapping_sub(part.addresses.start))?;
        let (start, end) = (bias.max(range.start), end.min(range.end));
        (start < end).then_some((start, MappingRecord { end, bias, directory: part.directory, reserved: 0 }))
    })
}

fn without_table(range: Range<u64>) -> Record {
    (range.start, MappingRecord { end: range.end, ..MappingRecord::UNUSED })
}

/// Appends a record unless it is empty; makes one of two without a table that touch.
fn push(records: &mut Vec<Record>, (start, record): Record) {
    if start >= record.end {
        return;
    }
    if let Some((_, last)) = records.last_mut()
        && (last.directory, record.directory, last.end) == (NO_DIRECTORY, NO_DIRECTORY, start)
    {
        last.end = record.end;
        return;
    }
    records.push((start, record));
}

/// The map value.
pub(super) fn chunk(records: &[Record]) -> Box<MappingChunk> {
    let mut chunk = Box::new(MappingChunk::EMPTY);
    let slots = chunk.starts.iter_mut().zip(&mut chunk.records);
    for ((start, slot), &(from, record)) in slots.zip(records) {
        (*start, *slot) = (from, record);
    }
    chunk
}

#[cfg(test)]
mod tests {
    use profiler_common::unwind::mappings::find_mapping;

    use super::*;

    fn table(bias: u64, parts: &[(Range<u64>, u32)]) -> Option<MappedTable> {
        let part = |(addresses, directory): &(Range<u64>, u32)| Part {
            addresses: addresses.clone(),
            directory: *directory,
        };
        Some(MappedTable { bias, parts: parts.iter().map(part).collect() })
    }

    /// Looks up as the kernel does: directory and address relative to its start.
    #[track_caller]
    fn check(ranges: &[CodeRange], address: u64, expect: Option<(u32, u64)>) {
        let records = records(ranges).expect("few records");
        assert!(records.is_sorted_by(|a, b| a.1.end <= b.0), "{records:x?}");
        let found = find_mapping(&&*chunk(&records), address);
        let found = found.map(|record| (record.directory, address.wrapping_sub(record.bias)));
        let found = found.map(|(id, at)| if id == NO_DIRECTORY { (id, 0) } else { (id, at) });
        assert_eq!(found, expect, "{address:#x} in {records:x?}");
    }

    #[test]
    fn a_mapping_is_split_where_another_directory_begins() {
        let parts = [(0x1100..0x2000, 3), (0x2000..0x2f00, 4)];
        let range = CodeRange { addresses: 0x7000_1000..0x7000_4000, table: table(0x7000_0000, &parts) };
        let ranges = [range];
        check(&ranges, 0x7000_0fff, None);
        check(&ranges, 0x7000_1000, Some((NO_DIRECTORY, 0)));
        check(&ranges, 0x7000_1100, Some((3, 0)));
        check(&ranges, 0x7000_1fff, Some((3, 0xeff)));
        check(&ranges, 0x7000_2000, Some((4, 0)));
        check(&ranges, 0x7000_2f00, Some((NO_DIRECTORY, 0)));
        check(&ranges, 0x7000_4000, None);
    }

    #[test]
    fn a_mapping_of_the_middle_of_a_part_keeps_its_addresses() {
        let range = CodeRange { addresses: 0x5000..0x6000, table: table(0x1000, &[(0..0x10_0000, 9)]) };
        check(&[range], 0x5800, Some((9, 0x4800)));
    }

    #[test]
    fn a_bias_below_zero_wraps_as_addresses_do() {
        let range = CodeRange {
            addresses: 0x5000..0x6000,
            table: table(0x5000u64.wrapping_sub(0x40_0000), &[(0x40_0000..0x40_1000, 2)]),
        };
        check(&[range], 0x5010, Some((2, 0x10)));
    }

    #[test]
    fn neighbors_without_a_table_are_one_record() {
        let range = |start| CodeRange { addresses: start..start + 0x1000, table: None };
        let ranges: Vec<_> = (1..=4000).map(|page| range(page * 0x1000)).collect();
        assert_eq!(records(&ranges).expect("one record").len(), 1);
        check(&ranges, 0x1000, Some((NO_DIRECTORY, 0)));
    }

    #[test]
    fn more_records_than_a_chunk_holds_are_refused() {
        let range = |at: u64| CodeRange { addresses: at * 0x2000..at * 0x2000 + 0x1000, table: None };
        let ranges: Vec<_> = (1..=CHUNK_RECORDS as u64 + 1).map(range).collect();
        assert!(records(&ranges).is_none());
        assert!(records(&ranges[1..]).is_some());
    }

    #[test]
    fn the_vsyscall_page_is_in_nobodys_way() {
        let range = |start| CodeRange { addresses: start..start + 0x1000, table: None };
        let ranges = [0x1000, 0x3000, 0x5000, 0x7000, 0xffff_ffff_ff60_0000].map(range);
        check(&ranges, 0x1800, Some((NO_DIRECTORY, 0)));
        check(&ranges, 0x7800, Some((NO_DIRECTORY, 0)));
        check(&ranges, 0xffff_ffff_ff60_0000, None);
    }

    #[test]
    fn one_more_range_is_as_if_it_had_been_there_when_all_were_read() {
        let range = |start: u64, end: u64, directory: Option<u32>| CodeRange {
            addresses: start..end,
            table: directory.and_then(|id| table(start, &[(0..end - start, id)])),
        };
        let (a, b) = (range(0x1000, 0x3000, Some(1)), range(0x5000, 0x7000, None));
        for new in [range(0x3000, 0x5000, Some(2)), range(0x7000, 0x8000, None), range(0x100, 0x200, Some(2))]
        {
            let mut all = vec![a.clone(), b.clone(), new.clone()];
            all.sort_by_key(|range| range.addresses.start);
            let read = records(&[a.clone(), b.clone()]).expect("few records");
            assert_eq!(with(&read, &new), records(&all).expect("few records"), "{new:x?}");
        }
        let over = with(&records(&[a, b]).expect("few records"), &range(0x2000, 0x6000, Some(2)));
        let found: Vec<_> = over.iter().map(|&(at, record)| (at, record.end, record.directory)).collect();
        assert_eq!(
            found,
            [(0x1000, 0x2000, 1), (0x2000, 0x6000, 2), (0x6000, 0x7000, NO_DIRECTORY)],
            "what it lies over is no more"
        );
        assert_eq!(over[0].1.bias, 0x1000, "what is left of a range keeps its addresses");
    }

    #[test]
    fn a_part_at_the_end_of_the_address_space_is_left_out() {
        let range = CodeRange { addresses: 0x5000..0x6000, table: table(u64::MAX - 10, &[(0..0x1000, 2)]) };
        check(&[range], 0x5000, Some((NO_DIRECTORY, 0)));
    }
}
