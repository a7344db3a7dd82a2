//! Byte offsets of structure members in the running kernel, from its BTF.
//!
//! Source: Documentation/bpf/btf.rst. Only structures, unions, and what must be skipped between them are read.

use std::{collections::HashMap, fs, io, path::Path};

/// Bytes of BTF accepted. Distribution kernels have 4 to 10 MiB.
const BTF_BYTES_MAX: u64 = 256 << 20;
/// Unnamed members are searched this deep: `task_struct` nests one.
const NESTING_MAX: u32 = 4;

/// Why the kernel's BTF could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BtfError {
    #[error("read {path}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("BTF ends or contradicts itself at byte {offset}")]
    Malformed { offset: usize },
}

/// The types of a BTF blob, indexed by id.
pub(crate) struct Btf {
    bytes: Vec<u8>,
    /// Start of each type's record in `bytes`, by id less one.
    records: Vec<u32>,
    /// Start of the string section.
    strings: usize,
}

/// Kinds of BTF types, with their numbers.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const ENUM64: u32 = 19;
}

const HEAD_BYTES: usize = 12;
const MEMBER_BYTES: usize = 12;
const ENUMERATOR_BYTES: usize = 8;

impl Btf {
    /// Reads and indexes the running kernel's BTF.
    pub(crate) fn of_kernel(sys_root: &Path) -> Result<Self, BtfError> {
        let path = sys_root.join("kernel/btf/vmlinux");
        let read = || {
            let length = fs::metadata(&path)?.len();
            if length > BTF_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes, too large")));
            }
            fs::read(&path)
        };
        let bytes = read().map_err(|source| BtfError::Read { path: path.display().to_string(), source })?;
        Self::parse(bytes)
    }

    fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        let at = |offset| u32_at(&bytes, offset);
        if at(0)? & 0xffff != 0xeb9f {
            return Err(BtfError::Malformed { offset: 0 });
        }
        let header = at(4)? as usize;
        let types = header + at(8)? as usize;
        let types_end = types + at(12)? as usize;
        let strings = header + at(16)? as usize;
        let mut records = Vec::new();
        let mut offset = types;
        while offset < types_end {
            records.push(u32::try_from(offset).map_err(|_| BtfError::Malformed { offset })?);
            offset += HEAD_BYTES + tail_bytes(at(offset + 4)?);
        }
        Ok(Self { bytes, records, strings })
    }

    /// The structures named in `wanted`, by name. One pass, since there are a hundred thousand types.
    pub(crate) fn structs<'a>(&self, wanted: &[&'a str]) -> HashMap<&'a str, StructId> {
        let mut found = HashMap::new();
        for &record in &self.records {
            let offset = record as usize;
            let Ok((name, info)) = self.head(offset) else { continue };
            if info_kind(info) != kind::STRUCT {
                continue;
            }
            let name = self.string(name);
            if let Some(&wanted) = wanted.iter().find(|wanted| wanted.as_bytes() == name) {
                found.entry(wanted).or_insert(StructId { record: offset });
            }
        }
        found
    }

    /// The value of an enumerator, by the names of its type and its own.
    pub(crate) fn enum_value(&self, of: &str, wanted: &str) -> Option<u32> {
        let named =
            |offset: usize| self.head(offset).ok().filter(|&(name, _)| self.string(name) == of.as_bytes());
        let (record, info) = self.records.iter().find_map(|&record| {
            let (_, info) = named(record as usize)?;
            (info_kind(info) == kind::ENUM).then_some((record as usize, info))
        })?;
        (0..info_len(info)).find_map(|index| {
            let at = record + HEAD_BYTES + index * ENUMERATOR_BYTES;
            let name = u32_at(&self.bytes, at).ok()?;
            (self.string(name) == wanted.as_bytes()).then(|| u32_at(&self.bytes, at + 4).ok())?
        })
    }

    /// Byte offset of a member of a structure, also inside its unnamed members. `None` when there is none, or when it
    /// is a bit field.
    pub(crate) fn member_offset(&self, of: StructId, member: &str) -> Option<u32> {
        self.find_member(of.record, member.as_bytes(), 0).and_then(|bits| (bits % 8 == 0).then_some(bits / 8))
    }

    /// The offset in bits.
    fn find_member(&self, record: usize, wanted: &[u8], depth: u32) -> Option<u32> {
        let (_, info) = self.head(record).ok()?;
        for index in 0..info_len(info) {
            let at = record + HEAD_BYTES + index * MEMBER_BYTES;
            let name = self.string(u32_at(&self.bytes, at).ok()?);
            let type_id = u32_at(&self.bytes, at + 4).ok()?;
            let offset = u32_at(&self.bytes, at + 8).ok()?;
            let bits = if info >> 31 == 1 { offset & 0x00ff_ffff } else { offset };
            if name == wanted {
                return Some(bits);
            }
            if name.is_empty() && depth < NESTING_MAX {
                let nested =
                    self.aggregate(type_id).and_then(|record| self.find_member(record, wanted, depth + 1));
                if let Some(nested) = nested {
                    return Some(bits + nested);
                }
            }
        }
        None
    }

    /// The record of a structure or union.
    fn aggregate(&self, type_id: u32) -> Option<usize> {
        let record = *self.records.get(type_id.checked_sub(1)? as usize)? as usize;
        let (_, info) = self.head(record).ok()?;
        matches!(info_kind(info), kind::STRUCT | kind::UNION).then_some(record)
    }

    fn head(&self, record: usize) -> Result<(u32, u32), BtfError> {
        Ok((u32_at(&self.bytes, record)?, u32_at(&self.bytes, record + 4)?))
    }

    fn string(&self, offset: u32) -> &[u8] {
        let rest = self.bytes.get(self.strings + offset as usize..).unwrap_or_default();
        rest.split(|&byte| byte == 0).next().unwrap_or_default()
    }
}

/// A structure found by [`Btf::structs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StructId {
    record: usize,
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, BtfError> {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk::<4>())
        .map(|word| u32::from_ne_bytes(*word))
        .ok_or(BtfError::Malformed { offset })
}

fn info_kind(info: u32) -> u32 {
    (info >> 24) & 0x1f
}

fn info_len(info: u32) -> usize {
    (info & 0xffff) as usize
}

/// Bytes of a type's record behind its head.
fn tail_bytes(info: u32) -> usize {
    let len = info_len(info);
    match info_kind(info) {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => len * 12,
        kind::ENUM | kind::FUNC_PROTO => len * 8,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BTF of `struct outer { int a; struct { int pad; int inner; }; }`, ids 1 (int), 2 (unnamed), 3 (outer).
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0a\0pad\0inner\0outer\0";
        let types: Vec<u32> = vec![
            1,
            1 << 24,
            4,
            0x2000_0000 | 32, // int
            0,
            (4 << 24) | 2,
            8,
            7,
            1,
            0,
            11,
            1,
            32, // struct { pad, inner }
            17,
            (4 << 24) | 2,
            12,
            5,
            1,
            0,
            0,
            2,
            32, // struct outer
        ];
        let type_bytes = types.len() as u32 * 4;
        let header = [0x0001_eb9f, 24, 0, type_bytes, type_bytes, strings.len() as u32];
        let mut bytes: Vec<u8> = header.iter().chain(&types).flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend_from_slice(strings);
        bytes
    }

    #[test]
    fn members_are_found_also_inside_unnamed_ones() {
        let btf = Btf::parse(sample()).expect("well-formed");
        let outer = btf.structs(&["outer"])["outer"];
        assert_eq!(btf.member_offset(outer, "a"), Some(0));
        assert_eq!(btf.member_offset(outer, "inner"), Some(8));
        assert_eq!(btf.member_offset(outer, "nothing"), None);
    }

    #[test]
    fn every_truncation_is_an_error_or_a_smaller_index_never_a_panic() {
        let whole = sample();
        for length in 0..whole.len() {
            if let Ok(btf) = Btf::parse(whole[..length].to_vec()) {
                for id in btf.structs(&["outer"]).into_values() {
                    let _ = btf.member_offset(id, "inner");
                }
            }
        }
    }

    #[test]
    fn this_kernel_numbers_its_cgroup_controllers() {
        let btf = Btf::of_kernel(Path::new("/sys")).expect("this kernel has BTF");
        let number = |name| btf.enum_value("cgroup_subsys_id", name);
        assert!(number("memory_cgrp_id").is_some());
        assert_ne!(number("memory_cgrp_id"), number("pids_cgrp_id"));
        assert_eq!(number("nothing_cgrp_id"), None);
        assert_eq!(btf.enum_value("no_such_enum", "memory_cgrp_id"), None);
    }

    #[test]
    fn this_kernel_says_where_a_task_keeps_its_name() {
        let btf = Btf::of_kernel(Path::new("/sys")).expect("this kernel has BTF");
        let task = btf.structs(&["task_struct"])["task_struct"];
        for member in ["comm", "mm", "group_leader", "start_boottime", "stack"] {
            assert!(btf.member_offset(task, member).is_some_and(|offset| offset > 0), "{member}");
        }
    }
}
