//! Names as their authors wrote them.

use std::borrow::Cow;
use std::fmt;

/// Longest name that leaves this module, in bytes. Deep C++ templates are cut; a few hundred mangled bytes can
/// stand for an exponentially long name.
const NAME_BYTES_MAX: usize = 8 << 10;

/// Stands for the rest of a name that was cut.
const CUT: &str = "…";

/// Whether a name is a linker's for a Rust or C++ function.
pub(crate) fn is_mangled(name: &str) -> bool {
    ["_R", "_Z", "__Z", "_GLOBAL_"].iter().any(|prefix| name.starts_with(prefix))
}

/// The readable form of a linker's symbol name: Rust (legacy and v0, without the hash) and Itanium C++; glibc's
/// internal aliases (`__GI_malloc`) as the function they stand for; other names as they are. At most
/// `NAME_BYTES_MAX` bytes and the mark of a cut.
pub(crate) fn demangle(name: &str) -> Cow<'_, str> {
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        return Cow::Owned(bounded(|out| fmt::write(out, format_args!("{rust:#}"))));
    }
    if is_mangled(name)
        && name.len() <= NAME_BYTES_MAX
        && let Ok(symbol) = cpp_demangle::Symbol::new(name)
    {
        let options = cpp_demangle::DemangleOptions::default();
        let readable = bounded(|out| symbol.structured_demangle(out, &options));
        if !readable.is_empty() {
            return Cow::Owned(readable);
        }
    }
    cut(name.strip_prefix("__GI_").unwrap_or(name))
}

/// At most `NAME_BYTES_MAX` bytes of a name from a file.
pub(crate) fn cut(name: &str) -> Cow<'_, str> {
    if name.len() <= NAME_BYTES_MAX {
        return Cow::Borrowed(name);
    }
    Cow::Owned(bounded(|out| fmt::Write::write_str(out, name)))
}

/// What `write` gives, up to the bound; an error of its own leaves what was written, which is empty for a name that
/// cannot be shown at all.
fn bounded(write: impl FnOnce(&mut BoundedName) -> fmt::Result) -> String {
    let mut out = BoundedName(String::new());
    let whole = write(&mut out).is_ok();
    let BoundedName(mut name) = out;
    if !whole && !name.is_empty() {
        name.push_str(CUT);
    }
    name
}

struct BoundedName(String);

impl fmt::Write for BoundedName {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let free = NAME_BYTES_MAX - self.0.len();
        let fits = text.floor_char_boundary(free);
        self.0.push_str(text.get(..fits).unwrap_or_default());
        if fits < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(mangled: &str, expect: &str) {
        assert_eq!(demangle(mangled), expect);
    }

    #[test]
    fn names_are_shown_as_they_were_written() {
        check("main", "main");
        check("", "");
        check("runtime.mallocgc", "runtime.mallocgc");
        check("_ZN4core3fmt9Formatter3pad17h0123456789abcdefE", "core::fmt::Formatter::pad");
        check("_ZN3foo17h0123456789abcdefE.llvm.1234", "foo");
        check("_RNvC6_123foo3bar", "123foo::bar");
        check(
            "_ZNSt6vectorIiSaIiEE9push_backERKi",
            "std::vector<int, std::allocator<int> >::push_back(int const&)",
        );
        check("__GI___libc_malloc", "__libc_malloc");
        check("_ZN", "_ZN");
        check("_Zebra", "_Zebra");
    }

    #[test]
    fn a_name_that_grows_without_end_is_cut() {
        // f(A<int, int>, A<..>, ..): each argument's type holds the one before twice.
        let digit = |i: usize| char::from(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i]);
        let twice = |i: usize| format!("S_IS{0}_S{0}_E", digit(i));
        let bomb = format!("_Z1f1AIiiE{}", (0..36).map(twice).collect::<String>());
        let readable = demangle(&bomb);
        assert!(readable.starts_with("f(A<int, int>, A<A<int, int>, A<int, int> >"), "{readable}");

        for name in [readable, demangle(&"x".repeat(100_000))] {
            assert!(name.ends_with(CUT), "{} bytes", name.len());
            assert!(name.len() <= NAME_BYTES_MAX + CUT.len(), "{} bytes", name.len());
        }
    }

    proptest! {
        #[test]
        fn no_name_makes_it_panic(name in "(_Z|_R|__Z)?[A-Za-z0-9_$.]{0,64}\\PC{0,8}") {
            prop_assert!(demangle(&name).len() <= NAME_BYTES_MAX + CUT.len());
        }
    }
}
