//! What holds for every file: sound ones of any layout, and damaged ones.

use crate::elf_file::{ElfFile, Frames};
use profiler_common::unwind::{LEAF_ROWS, UNUSED_LEAF, UNUSED_OFFSET};
use profiler_unwind::{RuleSet, UnwindTable, from_elf, limits};
use proptest::collection::vec;
use proptest::prelude::*;

/// Start, bytes, and `(advance, CFA offset in words)` of each row.
type Function = (u64, u64, Vec<(u8, u8)>);

/// Any order, overlaps and ends outside of the code included.
fn functions() -> impl Strategy<Value = Vec<Function>> {
    let rows = vec((0u8..64, 0u8..40), 0..200);
    vec((0xf00u64..0x10_0100, 0u64..0x3000, rows), 1..40)
}

fn elf_bytes(functions: &[Function]) -> Vec<u8> {
    let mut frames = Frames::x86_64();
    for (start, bytes, rows) in functions {
        // DW_CFA_advance_loc, DW_CFA_def_cfa_offset.
        let instructions: Vec<u8> =
            rows.iter().flat_map(|&(advance, words)| [0x40 | advance, 0x0e, words]).collect();
        frames = frames.fde(*start, *bytes, &instructions);
    }
    ElfFile { eh_frame: frames.finish(), ..ElfFile::default() }.bytes()
}

fn check_shape(table: &UnwindTable) {
    let rows: Vec<_> = table.rows().collect();
    assert_eq!(rows.len() as u64, table.counts().rows);
    for pair in rows.windows(2) {
        assert!(pair[0].0 < pair[1].0, "rows are not sorted: {pair:x?}");
        assert_ne!(pair[0].1, pair[1].1, "equal neighbors: {pair:x?}");
    }
    for directory in table.directories() {
        let bases = directory.directory.bases;
        assert!(bases.is_sorted() && bases[0] == 0);
        let used = directory.directory.leaves.iter().take_while(|&&leaf| leaf != UNUSED_LEAF).count();
        assert!(directory.directory.leaves[used..].iter().all(|&leaf| leaf == UNUSED_LEAF));
    }
    for leaf in table.leaves() {
        let used = leaf.offsets.iter().take_while(|&&offset| offset != UNUSED_OFFSET).count();
        assert!((1..=LEAF_ROWS).contains(&used) && leaf.offsets[0] == 0);
        assert!(leaf.offsets[..used].is_sorted_by(|a, b| a < b));
        assert!(leaf.offsets[used..].iter().all(|&offset| offset == UNUSED_OFFSET));
    }
    check_search(table, &rows);
}

/// Every row is found at its first address and at its last.
fn check_search(table: &UnwindTable, rows: &[(u64, profiler_common::unwind::UnwindRule)]) {
    let end = table.directories().last().expect("a table has a directory").addresses.end;
    let ends = rows.iter().skip(1).map(|&(address, _)| address).chain([end]);
    for (&(start, rule), end) in rows.iter().zip(ends) {
        assert_eq!(table.find(start), Some(&rule), "{start:#x}");
        assert_eq!(table.find(end - 1), Some(&rule), "{:#x}", end - 1);
    }
    assert_eq!(table.find(end), None);
    assert_eq!(table.find(rows[0].0.wrapping_sub(1)), None);
}

/// A function that is alive and has no other, nor the other's padding, in its range.
fn is_alone(functions: &[Function], at: usize) -> bool {
    let alive = |&(start, bytes, _): &Function| start >= 0x1000 && start + bytes <= 0x10_0000 && bytes > 0;
    let (start, bytes, _) = functions[at];
    let near =
        |&(other, other_bytes, _): &Function| other < start + bytes && start < other + other_bytes + 16;
    let others = functions.iter().enumerate().filter(|&(other, _)| other != at);
    alive(&functions[at]) && !others.map(|(_, other)| other).any(|other| alive(other) && near(other))
}

/// The CFA offset that a function gives one of its addresses.
fn cfa_offset(&(start, _, ref rows): &Function, address: u64) -> i32 {
    let (mut at, mut offset) = (start, 8);
    for &(advance, words) in rows {
        at += u64::from(advance);
        if at > address {
            break;
        }
        offset = words.into();
    }
    offset
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn rows_are_sorted_and_disjoint_and_found(functions in functions()) {
        if let Ok(table) = from_elf(&elf_bytes(&functions)) {
            check_shape(&table);
        }
    }

    #[test]
    fn an_address_in_one_function_has_the_rule_of_its_last_row(functions in functions(), within in any::<u64>()) {
        let table = from_elf(&elf_bytes(&functions));
        for at in (0..functions.len()).filter(|&at| is_alone(&functions, at)) {
            let (start, bytes, _) = functions[at];
            let address = start + within % bytes;
            let found = table.as_ref().ok().and_then(|table| table.find(address));
            prop_assert_eq!(found.map(|rule| rule.cfa_offset), Some(cfa_offset(&functions[at], address)));
        }
    }

    #[test]
    fn damaged_files_give_a_sound_table_or_an_error(
        functions in functions(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = elf_bytes(&functions);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(bytes.len() - cut.index(bytes.len()) / 8);
        if let Ok(table) = from_elf(&bytes) {
            check_shape(&table);
            prop_assert!(table.rules().len() <= limits::RULES_PER_FILE_MAX);
        }
    }

    #[test]
    fn renumbered_leaves_name_the_same_rules(functions in functions()) {
        let Ok(table) = from_elf(&elf_bytes(&functions)) else { return Ok(()) };
        let mut rules = RuleSet::new(table.architecture());
        let ids = rules.acquire(table.rules()).unwrap();
        for leaf in table.leaves() {
            let renumbered = ids.renumber(leaf);
            prop_assert_eq!(renumbered.offsets, leaf.offsets);
            for (&id, &local) in renumbered.rules.iter().zip(&leaf.rules) {
                prop_assert_eq!(rules.rule(id), Some(table.rules()[usize::from(local)]));
            }
        }
    }
}
