//! One more mapping among those of a process: what it lies over is no more.

use std::sync::Arc;

use super::image::{Backing, Mapping};
use crate::addr::Addr;

/// The mappings with one more, which replaces what others have of its range. Both are ascending and disjoint.
///
/// ```text
/// before   ├── a ──────────────┤      ├── b ──┤
/// new            ├── n ──┤
/// after    ├─ a ─┼── n ──┼─ a ─┤      ├── b ──┤
/// ```
pub(super) fn with(mappings: &[Mapping], new: Mapping) -> Arc<[Mapping]> {
    let (start, end) = (new.start, new.end);
    let before = mappings.iter().filter(|mapping| mapping.start < start).map(|mapping| {
        let end = mapping.end.min(start);
        Mapping { end, ..mapping.clone() }
    });
    let behind = mappings.iter().filter(|mapping| mapping.end > end).map(|mapping| {
        let start = mapping.start.max(end);
        Mapping { start, offset: mapping.file_offset(start), ..mapping.clone() }
    });
    before.chain([new]).chain(behind).collect()
}

/// Whether a range without a file lies in one that is known to have none: a generator of code has made known memory
/// writable and executable again, which says nothing new.
pub(super) fn is_known_memory(mappings: &[Mapping], start: Addr, end: Addr) -> bool {
    let at = mappings.partition_point(|mapping| mapping.start <= start);
    let found = at.checked_sub(1).and_then(|at| mappings.get(at));
    found.is_some_and(|found| end <= found.end && matches!(found.backing, Backing::Anonymous))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::FileOffset;

    fn mapping(start: u64, end: u64, name: &str) -> Mapping {
        let backing = if name.is_empty() { Backing::Anonymous } else { Backing::Unnamed(name.into()) };
        Mapping { start: Addr(start), end: Addr(end), offset: FileOffset(0), backing }
    }

    /// A range and the name of what lies behind it.
    type Range = (u64, u64, &'static str);

    #[track_caller]
    fn check(before: &[Range], new: Range, expect: &[Range]) {
        let mapping = |&(start, end, name): &Range| mapping(start, end, name);
        let before: Vec<_> = before.iter().map(mapping).collect();
        let after = with(&before, mapping(&new));
        let name = |mapping: &Mapping| match &mapping.backing {
            Backing::Unnamed(name) => name.to_string(),
            _ => String::new(),
        };
        let found: Vec<_> = after.iter().map(|found| (found.start.0, found.end.0, name(found))).collect();
        let expect: Vec<_> = expect.iter().map(|&(start, end, name)| (start, end, name.to_owned())).collect();
        assert_eq!(found, expect);
    }

    #[test]
    fn a_new_mapping_takes_the_place_of_what_it_lies_over() {
        let two = [(10, 20, "a"), (30, 40, "b")];
        check(&[], (10, 20, "n"), &[(10, 20, "n")]);
        check(&two, (20, 30, "n"), &[(10, 20, "a"), (20, 30, "n"), (30, 40, "b")]);
        check(&two, (10, 20, "n"), &[(10, 20, "n"), (30, 40, "b")]);
        check(&two, (5, 50, "n"), &[(5, 50, "n")]);
        check(&two, (15, 35, "n"), &[(10, 15, "a"), (15, 35, "n"), (35, 40, "b")]);
        check(&two, (12, 15, "n"), &[(10, 12, "a"), (12, 15, "n"), (15, 20, "a"), (30, 40, "b")]);
    }

    #[test]
    fn memory_that_becomes_executable_again_is_known() {
        let mappings = [mapping(10, 20, "a"), mapping(30, 50, "")];
        assert!(is_known_memory(&mappings, Addr(30), Addr(50)));
        assert!(is_known_memory(&mappings, Addr(35), Addr(40)));
        assert!(!is_known_memory(&mappings, Addr(45), Addr(55)), "more of it");
        assert!(!is_known_memory(&mappings, Addr(10), Addr(20)), "a file's");
        assert!(!is_known_memory(&mappings, Addr(5), Addr(9)));
    }
}
