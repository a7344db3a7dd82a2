//! Languages whose code a profile names only with a switch: how each is recognized, and what the switch is.

/// One language and its runtime.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Language {
    /// Of the runtime.
    pub(crate) name: &'static str,
    /// Names of executables, with or without a version behind.
    executables: &'static [&'static str],
    /// Beginnings of names of libraries that programs embed it by.
    libraries: &'static [&'static str],
    /// Functions in which the runtime runs code of the language, as its symbols name them. None where it runs only what it
    /// has generated.
    loops: &'static [&'static str],
    /// The name of a frame in code that it has generated and that nothing names: one for each, so that frames add up.
    pub(crate) unnamed: &'static str,
    /// What gives the names.
    pub(crate) switch: &'static str,
}

/// Sources: the runtimes' manuals for the switches; for the loops, CPython: Python/ceval.c (PEP 523); Ruby: vm_exec.c,
/// vm.c; PHP: Zend/zend_vm_execute.h; LuaJIT: src/vm_x64.dasc, src/lj_dispatch.h; Lua: src/lvm.c; Perl: run.c; Node:
/// v8:src/builtins; Java: hotspot/share/runtime/javaCalls.cpp; .NET: coreclr/vm/callhelpers.cpp.
pub(crate) static ALL: [Language; 10] = [
    Language {
        name: "Python",
        executables: &["python"],
        libraries: &["libpython3", "libpython2"],
        loops: &["_PyEval_EvalFrameDefault"],
        unnamed: "[jit: names with python3 -X perf]",
        switch: "run python3 -X perf (3.12 or later), or set PYTHONPERFSUPPORT=1",
    },
    Language {
        name: "Node",
        executables: &["node", "nodejs", "electron"],
        libraries: &["libnode.so"],
        loops: &["Builtins_InterpreterEntryTrampoline"],
        unnamed: "[jit: names with node --perf-basic-prof]",
        switch: "run node --perf-basic-prof (with --interpreted-frames-native-stack for what is not compiled yet)",
    },
    Language {
        name: "Java",
        executables: &["java", "javac"],
        libraries: &["libjvm.so"],
        loops: &["JavaCalls::call_helper(JavaValue*, methodHandle const&, JavaCallArguments*, JavaThread*)"],
        unnamed: "[jit: names with jcmd PID Compiler.perfmap]",
        switch: "run jcmd PID Compiler.perfmap (JDK 17 or later) while it runs; start java with -XX:+PreserveFramePointer for \
                 whole stacks",
    },
    Language {
        name: ".NET",
        executables: &["dotnet"],
        libraries: &["libcoreclr.so"],
        loops: &["CallDescrWorkerInternal"],
        unnamed: "[jit: names with DOTNET_PerfMapEnabled=1]",
        switch: "set DOTNET_PerfMapEnabled=1",
    },
    Language {
        name: "Ruby",
        executables: &["ruby"],
        libraries: &["libruby"],
        loops: &["vm_exec_core", "rb_vm_exec"],
        unnamed: "[jit: names with ruby --yjit-perf]",
        switch: "run ruby --yjit --yjit-perf (3.3 or later), which names what is compiled; interpreted code has no switch",
    },
    Language {
        name: "PHP",
        executables: &["php", "php-fpm", "php-cgi"],
        libraries: &["libphp"],
        loops: &["execute_ex"],
        unnamed: "[jit: names with opcache.jit_debug=16]",
        switch: "set opcache.jit=function, opcache.jit_buffer_size=64M and opcache.jit_debug=16, which names what is compiled; \
                 interpreted code has no switch",
    },
    Language {
        name: "Erlang",
        executables: &["beam.smp"],
        libraries: &[],
        loops: &[],
        unnamed: "[jit: names with erl +JPperf true]",
        switch: "run erl +JPperf true (OTP 25 or later, with the JIT)",
    },
    Language {
        name: "LuaJIT",
        executables: &["luajit"],
        libraries: &["libluajit"],
        loops: &["lj_vm_call", "lj_vm_pcall", "lj_BC_FUNCF", "lj_vm_resume"],
        unnamed: "[jit: names with a LuaJIT built with LUAJIT_USE_PERFTOOLS]",
        switch: "build LuaJIT with -DLUAJIT_USE_PERFTOOLS, which names compiled traces; interpreted code has no switch",
    },
    Language {
        name: "Lua",
        executables: &["lua"],
        libraries: &["liblua5"],
        loops: &["luaV_execute"],
        unnamed: "[jit]",
        switch: "Lua has no switch that names its functions to profilers from outside",
    },
    Language {
        name: "Perl",
        executables: &["perl"],
        libraries: &["libperl.so"],
        loops: &["Perl_runops_standard"],
        unnamed: "[jit]",
        switch: "Perl has no switch that names its functions to profilers from outside",
    },
];

/// By the name of an executable: `python3.12`, `php-fpm8.2`.
pub(crate) fn of_executable(name: &str) -> Option<&'static Language> {
    ALL.iter().find(|language| language.executables.iter().any(|known| is_version_of(name, known)))
}

/// By the name of a file that a process has mapped: an executable, or a library that embeds the runtime.
pub(crate) fn of_file(name: &str) -> Option<&'static Language> {
    let embeds = |language: &&Language| language.libraries.iter().any(|known| name.starts_with(known));
    of_executable(name).or_else(|| ALL.iter().find(embeds))
}

/// By a function in which a runtime runs code of its language.
pub(crate) fn of_loop(function: &str) -> Option<&'static Language> {
    ALL.iter().find(|language| language.loops.contains(&function))
}

impl Language {
    /// What a profile says where code of the language has run and nothing of it has a name.
    pub(crate) fn hint(&self) -> String {
        format!("frames of {} code have no names: {}", self.name, self.switch)
    }
}

/// `python3.12` is `python`.
fn is_version_of(name: &str, known: &str) -> bool {
    let is_version = |rest: &str| rest.chars().all(|letter| letter.is_ascii_digit() || letter == '.');
    name.strip_prefix(known).is_some_and(|rest| is_version(rest.strip_prefix('-').unwrap_or(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_language_is_found_by_executable_library_and_loop() {
        let check = |found: Option<&Language>, expect: &str| {
            assert_eq!(found.map_or("none", |language| language.name), expect);
        };
        let executables = [
            ("python", "Python"),
            ("python3.12", "Python"),
            ("nodejs", "Node"),
            ("node-18", "Node"),
            ("java", "Java"),
            ("dotnet", ".NET"),
            ("ruby3.1", "Ruby"),
            ("php-fpm8.2", "PHP"),
            ("php8.2", "PHP"),
            ("beam.smp", "Erlang"),
            ("luajit-2.1.0", "LuaJIT"),
            ("lua5.4", "Lua"),
            ("perl", "Perl"),
            ("pythonista", "none"),
            ("javascript", "none"),
            ("luau", "none"),
            ("", "none"),
        ];
        for (name, expect) in executables {
            check(of_executable(name), expect);
        }
        let files = [
            ("libpython3.11.so.1.0", "Python"),
            ("libjvm.so", "Java"),
            ("libcoreclr.so", ".NET"),
            ("libruby-3.1.so.3.1", "Ruby"),
            ("libphp8.so", "PHP"),
            ("libluajit-5.1.so.2", "LuaJIT"),
            ("liblua5.4.so.0", "Lua"),
            ("libperl.so.5.36", "Perl"),
            ("libc.so.6", "none"),
        ];
        for (name, expect) in files {
            check(of_file(name), expect);
        }
        for language in &ALL {
            for function in language.loops {
                check(of_loop(function), language.name);
            }
            for executable in language.executables {
                check(of_executable(executable), language.name);
            }
        }
        check(of_loop("main"), "none");
    }

    #[test]
    fn each_says_what_to_do_in_one_line() {
        for language in &ALL {
            let hint = language.hint();
            assert!(
                hint.lines().count() == 1 && hint.contains(language.name) && !hint.contains("  "),
                "{hint}"
            );
            assert!(language.unnamed.starts_with("[jit"), "{hint}");
        }
    }
}
