//! Perf maps: text files in which runtimes say where they have put which function.
//!
//! ```text
//! START SIZE NAME      START and SIZE hexadecimal, NAME to the end of the line
//! ```
//! Source: linux: tools/perf/Documentation/jit-interface.txt. This file stands alone: it is fuzzed as it is.

use std::collections::BTreeMap;

/// Ranges kept of one map. Node writes about 20,000 for a large server.
pub(crate) const RANGES_MAX: usize = 128 << 10;

/// Longest line taken, in bytes.
pub(crate) const LINE_BYTES_MAX: usize = 4096;

/// Where the functions are, and where in the file each one's name is: the names stay in the file, which only grows.
#[derive(Debug, Default)]
pub(crate) struct PerfMap {
    /// Disjoint, by first address.
    ranges: BTreeMap<u64, Range>,
    /// Lines left out: not as documented, too long, or beyond [`RANGES_MAX`].
    left_out: u64,
}

#[derive(Clone, Copy, Debug)]
struct Range {
    end: u64,
    /// Of the name, in the file.
    at: u32,
    len: u16,
}

/// Where a name is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NameAt {
    pub(crate) offset: u32,
    pub(crate) bytes: u16,
}

impl PerfMap {
    /// Takes the whole lines of `text`, which lies at `offset` in the file. Gives how many bytes they are: what is
    /// behind the last line feed is to be given again once there is more of it. A later line wins over an earlier one
    /// wherever they overlap.
    pub(crate) fn take(&mut self, text: &[u8], offset: u32) -> usize {
        let mut taken = 0;
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let Some(whole) = line.strip_suffix(b"\n") else { break };
            let at = u32::try_from(taken).ok().and_then(|into| offset.checked_add(into));
            let is_taken = at.is_some_and(|at| self.take_line(whole, at));
            self.left_out += u64::from(!is_taken);
            taken += line.len();
        }
        taken
    }

    /// The name of the function at an address.
    pub(crate) fn find(&self, addr: u64) -> Option<NameAt> {
        let (_, range) = self.ranges.range(..=addr).next_back()?;
        (addr < range.end).then_some(NameAt { offset: range.at, bytes: range.len })
    }

    /// Ranges there are.
    pub(crate) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Lines left out so far.
    pub(crate) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Counts a line that is too long to be looked at.
    pub(crate) fn leave_out(&mut self) {
        self.left_out += 1;
    }

    fn take_line(&mut self, line: &[u8], offset: u32) -> bool {
        let Some((start, end, name_at)) = parse(line) else { return false };
        let name_bytes = line.len() - name_at;
        let (Ok(into), Ok(len)) = (u32::try_from(name_at), u16::try_from(name_bytes)) else { return false };
        let Some(at) = offset.checked_add(into) else { return false };
        self.clear(start, end);
        // Clearing may cut one range in two, so there is room for two.
        if self.ranges.len() + 2 > RANGES_MAX {
            return false;
        }
        self.ranges.insert(start, Range { end, at, len });
        true
    }

    /// Makes a span free: what overlaps it is cut off at its ends.
    fn clear(&mut self, start: u64, end: u64) {
        let before = self.ranges.range_mut(..start).next_back();
        if let Some((_, range)) = before
            && range.end > start
        {
            let cut = *range;
            range.end = start;
            if cut.end > end {
                self.ranges.insert(end, cut);
            }
        }
        while let Some((&first, &range)) = self.ranges.range(start..end).next() {
            self.ranges.remove(&first);
            if range.end > end {
                self.ranges.insert(end, range);
            }
        }
    }
}

/// First address, first address behind, and where the name begins.
fn parse(line: &[u8]) -> Option<(u64, u64, usize)> {
    if line.len() > LINE_BYTES_MAX {
        return None;
    }
    let mut spaces = line.iter().enumerate().filter(|&(_, &byte)| byte == b' ').map(|(at, _)| at);
    let (first, second) = (spaces.next()?, spaces.next()?);
    let start = hex(line.get(..first)?)?;
    let size = hex(line.get(first + 1..second)?)?;
    let end = start.checked_add(size).filter(|&end| end > start)?;
    let name_at = second + 1;
    (name_at < line.len()).then_some((start, end, name_at))
}

/// Some runtimes write `0x` in front.
fn hex(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let digits = text.strip_prefix("0x").unwrap_or(text);
    // `from_str_radix` takes a sign.
    let is_digits = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_digits { u64::from_str_radix(digits, 16).ok() } else { None }
}

/// A name from a perf map, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Readable<'a> {
    pub(crate) function: &'a str,
    /// Empty when the name has none.
    pub(crate) file: &'a str,
    /// Of the function's first line; 0 when unknown.
    pub(crate) start_line: u32,
}

/// What V8 says of the tier a function was compiled by. Source: v8: src/objects/code-kind.cc, `CodeKindToMarker`.
const V8_TIERS: [char; 5] = ['~', '^', '+', '*', '\''];

/// Takes apart the names of V8 (`JS:*function file:line:column`, a function in each tier that it was compiled by) and
/// of CPython (`py::function:file`); other names are functions as they are.
pub(crate) fn readable(name: &str) -> Readable<'_> {
    let whole = Readable { function: name, file: "", start_line: 0 };
    if let Some(python) = name.strip_prefix("py::") {
        let (function, file) = python.split_once(':').unwrap_or((python, ""));
        return Readable { function, file, start_line: 0 };
    }
    let kinds = ["JS:", "LazyCompile:", "Function:", "Script:", "Eval:"];
    let Some(rest) = kinds.iter().find_map(|kind| name.strip_prefix(kind)) else { return whole };
    let rest = rest.trim_start_matches(V8_TIERS);
    let (function, place) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut parts = place.rsplitn(3, ':');
    let (column, line, file) = (parts.next(), parts.next(), parts.next());
    let is_number = |text: Option<&str>| text.is_some_and(|text| text.parse::<u32>().is_ok());
    let (file, line) = match file {
        Some(file) if is_number(line) && is_number(column) => (file, line),
        _ => (place, None),
    };
    let function = if function.is_empty() { "(anonymous)" } else { function };
    Readable { function, file, start_line: line.and_then(|line| line.parse().ok()).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(text: &str) -> PerfMap {
        let mut map = PerfMap::default();
        map.take(text.as_bytes(), 0);
        map
    }

    #[track_caller]
    fn check(text: &str, addr: u64, expect: Option<&str>) {
        let name = |at: NameAt| &text[at.offset as usize..][..usize::from(at.bytes)];
        assert_eq!(map(text).find(addr).map(name), expect, "{addr:#x}");
    }

    #[test]
    fn an_address_is_in_the_range_of_its_line() {
        let text = "1000 10 a b\n0x1010 0x8 c\n";
        check(text, 0xfff, None);
        check(text, 0x1000, Some("a b"));
        check(text, 0x100f, Some("a b"));
        check(text, 0x1010, Some("c"));
        check(text, 0x1018, None);
    }

    #[test]
    fn a_later_line_wins_where_it_overlaps() {
        let text = "1000 30 old\n1010 10 new\n";
        check(text, 0x1000, Some("old"));
        check(text, 0x1010, Some("new"));
        check(text, 0x1020, Some("old"));
        check("1010 10 a\n1020 10 b\n1000 28 over\n", 0x1027, Some("over"));
        check("1010 10 a\n1020 10 b\n1000 28 over\n", 0x1028, Some("b"));
        check("1000 10 a\n1000 10 b\n", 0x1000, Some("b"));
    }

    #[test]
    fn lines_that_are_not_as_documented_are_counted_and_left_out() {
        let long = format!("3000 10 {}\n", "x".repeat(LINE_BYTES_MAX));
        let text =
            format!("\n1000\n1000 10\n1000 10 \nzz 10 x\n+1 10 x\n1000 0 x\nffffffffffffffff 2 x\n{long}");
        let map = map(&text);
        assert_eq!((map.len(), map.left_out()), (0, 9));
    }

    #[test]
    fn a_line_without_its_end_is_left_for_later() {
        let mut map = PerfMap::default();
        let text = b"1000 10 a\n2000 10 b";
        assert_eq!(map.take(text, 0), 10);
        assert_eq!(map.find(0x2000), None);
        assert_eq!(map.take(b"2000 10 b\n", 10), 10);
        assert_eq!(map.find(0x2000), Some(NameAt { offset: 18, bytes: 1 }));
    }

    #[test]
    fn ranges_are_bounded() {
        let lines: String = (0..RANGES_MAX + 10).map(|at| format!("{:x} 8 f\n", at * 16)).collect();
        let map = map(&lines);
        assert!(map.len() <= RANGES_MAX);
        assert_eq!(map.len() as u64 + map.left_out(), RANGES_MAX as u64 + 10);
    }

    #[test]
    fn names_of_v8_and_python_are_taken_apart() {
        let check = |name, function, file, start_line| {
            assert_eq!(readable(name), Readable { function, file, start_line }, "{name}");
        };
        check("JS:*hot /srv/a b.js:12:3", "hot", "/srv/a b.js", 12);
        check("JS:~hot file:///srv/x.mjs:1:14", "hot", "file:///srv/x.mjs", 1);
        check("JS:^ /srv/x.js:7:1", "(anonymous)", "/srv/x.js", 7);
        check("LazyCompile:*a.b x.js:1", "a.b", "x.js:1", 0);
        check("py::fib:/srv/x.py", "fib", "/srv/x.py", 0);
        check("Builtin:ArrayMap", "Builtin:ArrayMap", "", 0);
        check("Ljava/lang/String;::hashCode", "Ljava/lang/String;::hashCode", "", 0);
        check("", "", "", 0);
    }

    proptest! {
        #[test]
        fn ranges_answer_as_the_last_line_that_holds_an_address(
            lines in prop::collection::vec((0..64u64, 1..16u64), 0..40)
        ) {
            let text: String =
                lines.iter().enumerate().map(|(at, (start, size))| format!("{start:x} {size:x} n{at}\n")).collect();
            let map = map(&text);
            for addr in 0..80 {
                let holds = |&(start, size): &(u64, u64)| (start..start + size).contains(&addr);
                let expect = lines.iter().rposition(holds).map(|at| format!("n{at}"));
                let found = map.find(addr).map(|at| text[at.offset as usize..][..usize::from(at.bytes)].to_owned());
                prop_assert_eq!(found, expect, "{:#x} in\n{}", addr, text);
            }
        }
    }
}
