//! What a message will take in memory, read off its bytes before anything is allocated.
//!
//! Two bytes of protobuf can become a `Sample` of 72 bytes: a bound on the input alone bounds little.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::proto::{Function, Label, Line, Location, Mapping, Sample, ValueType};

/// One field of a message.
pub(crate) struct Field<'a> {
    pub(crate) tag: u32,
    /// The bytes of a length-delimited field; empty for a number.
    pub(crate) payload: &'a [u8],
}

/// The fields of one message, in the order of its bytes. Ends at the first malformed one: a decoder cannot get
/// further either.
pub(crate) fn fields(mut bytes: &[u8]) -> impl Iterator<Item = Field<'_>> {
    std::iter::from_fn(move || {
        let (tag, wire_type) = decode_key(&mut bytes).ok()?;
        if wire_type != WireType::LengthDelimited {
            skip_field(wire_type, tag, &mut bytes, DecodeContext::default()).ok()?;
            return Some(Field { tag, payload: &[] });
        }
        let len = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
        let (payload, rest) = bytes.split_at_checked(len)?;
        bytes = rest;
        Some(Field { tag, payload })
    })
}

/// Bytes of memory that the entries of a decoded [`crate::proto::Profile`] take, without the room that growing
/// lists keep in reserve, which is at most as much again.
pub(crate) fn profile_footprint(protobuf: &[u8]) -> usize {
    let footprint = |Field { tag, payload }| match tag {
        1 => size_of::<ValueType>(),
        2 => size_of::<Sample>() + fields(payload).map(sample_field).sum::<usize>(),
        3 => size_of::<Mapping>(),
        4 => size_of::<Location>() + fields(payload).map(location_field).sum::<usize>(),
        5 => size_of::<Function>(),
        6 => size_of::<String>() + payload.len(),
        13 => numbers(payload),
        _ => 0,
    };
    fields(protobuf).map(footprint).sum()
}

fn sample_field(Field { tag, payload }: Field<'_>) -> usize {
    match tag {
        1 | 2 => numbers(payload),
        3 => size_of::<Label>(),
        _ => 0,
    }
}

fn location_field(Field { tag, .. }: Field<'_>) -> usize {
    if tag == 4 { size_of::<Line>() } else { 0 }
}

/// A repeated number: packed ones end with a byte below 0x80 each; one that is not packed has no payload.
fn numbers(payload: &[u8]) -> usize {
    size_of::<u64>() * payload.iter().filter(|&&byte| byte < 0x80).count().max(1)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::Profile;

    #[test]
    fn the_footprint_is_what_the_lists_hold() {
        let profile = Profile {
            sample: vec![
                Sample {
                    location_id: vec![1, 300, 70_000],
                    value: vec![-1, 5],
                    label: vec![Label::default()],
                },
                Sample::default(),
            ],
            location: vec![Location { line: vec![Line::default(); 2], ..Default::default() }],
            string_table: vec![String::new(), "abc".to_owned()],
            comment: vec![1, 1],
            ..Default::default()
        };
        let lists = 2 * size_of::<Sample>() + size_of::<Location>() + 2 * size_of::<String>();
        let expect = lists + 5 * 8 + size_of::<Label>() + 2 * size_of::<Line>() + 3 + 2 * 8;
        assert_eq!(profile_footprint(&profile.encode_to_vec()), expect);
    }

    #[test]
    fn numbers_that_are_not_packed_count_too() {
        // Sample { location_id: [1, 2] } with one field per number.
        let bytes = [0x12, 0x04, 0x08, 0x01, 0x08, 0x02];
        assert_eq!(profile_footprint(&bytes), size_of::<Sample>() + 16);
    }

    #[test]
    fn fields_end_where_the_bytes_are_malformed() {
        assert_eq!(fields(&[0x08, 0x01, 0x12, 0x05, 0x00]).count(), 1);
        assert_eq!(fields(&[0xff; 11]).count(), 0);
        assert_eq!(fields(&[]).count(), 0);
    }
}
