//! Names of functions that allocate and free.

use profiler_common::heap::Call;

/// Prefixes under which allocators have the same functions once more, for programs that link several.
const PREFIXES: [&str; 5] = ["_rjem_", "__libc_", "je_", "mi_", "tc_"];

/// What the function of this name does with its arguments, if it is one of an allocator's.
///
/// Source: C23 §7.24.3; posix_memalign(3); Itanium C++ ABI, mangled `operator new` and `operator delete`; jemalloc(3); mimalloc.h.
#[must_use]
pub fn call_of(name: &str) -> Option<Call> {
    if is_operator(name) {
        return operator(name);
    }
    plain(name)
        .or_else(|| name.strip_prefix("mi_").and_then(mimalloc))
        .or_else(|| PREFIXES.iter().find_map(|prefix| plain(name.strip_prefix(prefix)?)))
}

/// Whether a name of an allocator's function is the one of the C library or of C++: of several objects that define it, the
/// dynamic linker has the first one called.
#[must_use]
pub(crate) fn is_standard(name: &str) -> bool {
    plain(name).is_some() || operator(name).is_some()
}

fn is_operator(name: &str) -> bool {
    name.starts_with("_Zn") || name.starts_with("_Zd")
}

fn plain(name: &str) -> Option<Call> {
    Some(match name {
        "malloc" | "valloc" | "pvalloc" | "mallocx" => Call::Allocate,
        "calloc" => Call::AllocateArray,
        "realloc" | "rallocx" => Call::Reallocate,
        "reallocarray" => Call::ReallocateArray,
        "memalign" | "aligned_alloc" => Call::AllocateAligned,
        "posix_memalign" => Call::AllocateInto,
        "free" | "cfree" | "free_sized" | "free_aligned_sized" | "dallocx" | "sdallocx" => Call::Free,
        _ => return None,
    })
}

/// Of mimalloc's own functions those with no name of the C library, without their prefix.
fn mimalloc(name: &str) -> Option<Call> {
    Some(match name {
        "zalloc"
        | "malloc_small"
        | "zalloc_small"
        | "malloc_aligned"
        | "zalloc_aligned"
        | "new"
        | "new_nothrow"
        | "new_aligned"
        | "new_aligned_nothrow" => Call::Allocate,
        "mallocn" | "new_n" | "calloc_aligned" => Call::AllocateArray,
        "reallocf" | "realloc_aligned" | "rezalloc" | "rezalloc_aligned" | "new_realloc" => Call::Reallocate,
        "reallocn" | "recalloc" | "new_reallocn" => Call::ReallocateArray,
        "free_size" | "free_size_aligned" | "free_aligned" => Call::Free,
        _ => return None,
    })
}

/// `operator new(size[, alignment][, nothrow])`, `operator delete(pointer, ..)` and their array forms.
fn operator(name: &str) -> Option<Call> {
    const NEW: [&str; 4] = ["", "RKSt9nothrow_t", "St11align_val_t", "St11align_val_tRKSt9nothrow_t"];
    const DELETE: [&str; 6] =
        ["", "m", "RKSt9nothrow_t", "St11align_val_t", "mSt11align_val_t", "St11align_val_tRKSt9nothrow_t"];
    let new = name.strip_prefix("_Znwm").or_else(|| name.strip_prefix("_Znam"));
    let delete = name.strip_prefix("_ZdlPv").or_else(|| name.strip_prefix("_ZdaPv"));
    match (new, delete) {
        (Some(rest), _) if NEW.contains(&rest) => Some(Call::Allocate),
        (_, Some(rest)) if DELETE.contains(&rest) => Some(Call::Free),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_known_under_their_own_names_and_their_allocators() {
        for (name, call) in [
            ("malloc", Some(Call::Allocate)),
            ("_rjem_malloc", Some(Call::Allocate)),
            ("mi_free", Some(Call::Free)),
            ("posix_memalign", Some(Call::AllocateInto)),
            ("_Znwm", Some(Call::Allocate)),
            ("_ZnamSt11align_val_tRKSt9nothrow_t", Some(Call::Allocate)),
            ("_ZdlPvmSt11align_val_t", Some(Call::Free)),
            ("_ZnamRKSt9nothrow_t", Some(Call::Allocate)),
            ("_ZnwmSt11align_val_t", Some(Call::Allocate)),
            ("_ZdaPv", Some(Call::Free)),
            ("_ZdlPvm", Some(Call::Free)),
            ("_ZdlPvRKSt9nothrow_t", Some(Call::Free)),
            ("_ZdaPvSt11align_val_tRKSt9nothrow_t", Some(Call::Free)),
            ("reallocarray", Some(Call::ReallocateArray)),
            ("je_rallocx", Some(Call::Reallocate)),
            ("je_sdallocx", Some(Call::Free)),
            ("mi_zalloc", Some(Call::Allocate)),
            ("mi_reallocn", Some(Call::ReallocateArray)),
            ("mi_mallocn", Some(Call::AllocateArray)),
            ("mi_usable_size", None),
            ("zalloc", None),
            ("je_zalloc", None),
            ("_ZnwmPv", None),
            ("mallopt", None),
            ("malloc_usable_size", None),
            ("", None),
        ] {
            assert_eq!(call_of(name), call, "{name}");
        }
    }

    #[test]
    fn names_of_one_allocator_alone_are_not_standard() {
        for (name, expect) in
            [("malloc", true), ("_ZdlPv", true), ("mi_malloc", false), ("je_mallocx", false), ("main", false)]
        {
            assert_eq!(is_standard(name), expect, "{name}");
        }
    }
}
