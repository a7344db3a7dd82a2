//! What kind of code a frame runs.

use std::fmt;

/// The kind of code behind a location, as far as it is known.
///
/// On the wire it is `Location.kind`, field 1000, a varint of our own. A number this version does not know
/// reads as [`FrameKind::Unspecified`], so that a newer agent can talk to an older backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrameKind {
    /// Not said: [`FrameKind::of_mapping`] tells what to assume.
    #[default]
    Unspecified,
    /// Compiled ahead of time: C, C++, Rust, Zig, ...
    Native,
    /// The kernel or one of its modules.
    Kernel,
    /// Compiled at run time by an engine that is not named by a kind of its own.
    Jit,
    /// Compiled by the Go tool chain.
    Go,
    /// A Python function.
    Python,
    /// A Java, Kotlin, Scala, ... method.
    Jvm,
    /// A JavaScript function in V8.
    V8,
    /// No code: a synthetic frame that says why the stack is cut, such as
    /// `[truncated: no unwind information]`.
    Marker,
}

impl FrameKind {
    /// Every kind; a kind's index is its number on the wire.
    pub const ALL: [Self; 9] = [
        Self::Unspecified,
        Self::Native,
        Self::Kernel,
        Self::Jit,
        Self::Go,
        Self::Python,
        Self::Jvm,
        Self::V8,
        Self::Marker,
    ];

    /// The number in `Location.kind`.
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::Unspecified => 0,
            Self::Native => 1,
            Self::Kernel => 2,
            Self::Jit => 3,
            Self::Go => 4,
            Self::Python => 5,
            Self::Jvm => 6,
            Self::V8 => 7,
            Self::Marker => 8,
        }
    }

    /// The kind of a number in `Location.kind`; `None` for a number this version does not know.
    pub fn from_wire(wire: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(wire).ok()?).copied()
    }

    /// The kind to assume for code of a mapping with this file name when none is stated.
    ///
    /// Kernel mappings are named as perf names them: `[kernel.kallsyms]`, perhaps with the relocation symbol
    /// after it, `[kernel]`, `[guest.kernel.kallsyms]`.
    pub fn of_mapping(filename: &str) -> Self {
        match filename {
            "[jit]" => Self::Jit,
            name if name.starts_with("//anon") => Self::Jit,
            name if name.starts_with("[kernel") || name.starts_with("[guest.kernel") => Self::Kernel,
            _ => Self::Native,
        }
    }

    /// The kind's name in lower case, as shown to people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Native => "native",
            Self::Kernel => "kernel",
            Self::Jit => "jit",
            Self::Go => "go",
            Self::Python => "python",
            Self::Jvm => "jvm",
            Self::V8 => "v8",
            Self::Marker => "marker",
        }
    }
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_survives_the_wire() {
        for (number, kind) in FrameKind::ALL.into_iter().enumerate() {
            assert_eq!(usize::try_from(kind.to_wire()).unwrap(), number);
            assert_eq!(FrameKind::from_wire(kind.to_wire()), Some(kind));
        }
    }

    #[test]
    fn a_number_from_a_newer_version_is_no_kind() {
        assert_eq!(FrameKind::from_wire(9), None);
        assert_eq!(FrameKind::from_wire(u32::MAX), None);
    }

    #[test]
    fn the_mapping_tells_the_kind_when_none_is_stated() {
        #[track_caller]
        fn check(filename: &str, expect: FrameKind) {
            assert_eq!(FrameKind::of_mapping(filename), expect, "{filename}");
        }
        check("[kernel.kallsyms]", FrameKind::Kernel);
        check("[kernel.kallsyms]_stext", FrameKind::Kernel);
        check("[kernel]", FrameKind::Kernel);
        check("[guest.kernel.kallsyms]", FrameKind::Kernel);
        check("[jit]", FrameKind::Jit);
        check("//anon", FrameKind::Jit);
        check("[vdso]", FrameKind::Native);
        check("/usr/bin/jit", FrameKind::Native);
        check("", FrameKind::Native);
    }
}
