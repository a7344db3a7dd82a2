//! From a process's cgroup path to the container or systemd unit it belongs to.

/// What a cgroup path says about who runs in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Owner {
    /// 64 hexadecimal digits, as containerd, CRI-O, Docker and Podman name containers; the name of an LXC or
    /// systemd-nspawn container, which have no such id. The innermost when nested.
    pub(crate) container_id: Option<String>,
    /// Systemd service or scope outside containers, the innermost.
    pub(crate) unit: Option<String>,
    /// Systemd slice outside containers: the innermost of those that the system's own manager makes, so that all a user
    /// runs is in `user-<uid>.slice`. As `sd_pid_get_slice`.
    pub(crate) slice: Option<String>,
}

/// Reads `/proc/<pid>/cgroup`. Source: cgroups(7): one `id:controllers:path` line per hierarchy.
///
/// Controllers may be in different hierarchies (v1, hybrid), and a nested runtime need not have made its cgroup in all of
/// them: the path with most containers knows best. Among equals, systemd's own hierarchy (`name=systemd`) and the v2 one
/// (`0::`) come before the others.
pub(crate) fn owner(cgroup: &str) -> Owner {
    let mut lines: Vec<_> = cgroup.lines().filter_map(parse_line).collect();
    lines.sort_by_key(|&(controllers, path)| {
        let is_systemds = matches!(controllers, "" | "name=systemd");
        (std::cmp::Reverse(containers(path).count()), !is_systemds)
    });
    let paths = lines.iter().map(|&(_, path)| path);
    let container_id = paths.clone().next().and_then(|path| containers(path).last());
    if let Some(id) = container_id {
        return Owner { container_id: Some(unescape(id)), ..Owner::default() };
    }
    // A path that names the unit is the one that the slice is taken from too.
    let best = paths.clone().find(|path| unit(path).is_some());
    let slice = best.map_or_else(|| paths.clone().find_map(slice), slice);
    Owner {
        unit: best.and_then(unit).map(str::to_owned),
        slice: slice.map(str::to_owned),
        container_id: None,
    }
}

/// The same by a single path.
pub(super) fn owner_of_path(path: &str) -> Owner {
    owner(&format!("0::{path}"))
}

fn parse_line(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    // Of a process that is exiting: its cgroup may be removed before it is waited for.
    Some((controllers, path.strip_suffix(" (deleted)").unwrap_or(path)))
}

/// The containers that a path leads through, outermost first.
fn containers(path: &str) -> impl Iterator<Item = &str> {
    let components = path.split('/');
    components.clone().zip(components.skip(1).chain([""])).filter_map(|(component, below)| {
        container_id(component)
            .or_else(|| lxc_name(component, below))
            .or_else(|| nspawn_name(component, below))
    })
}

/// The id that a component is or ends in: `<id>`, `docker-<id>.scope`, `cri-containerd-<id>.scope`, `crio-<id>.scope`,
/// `libpod-<id>.scope`, `kubepods-pod<uid>.slice:cri-containerd:<id>`.
///
/// `crio-conmon-<id>.scope` and `libpod-conmon-<id>.scope` hold the program that watches the container from outside.
fn container_id(component: &str) -> Option<&str> {
    let component = component.strip_suffix(".scope").unwrap_or(component);
    let (before, id) = component.rsplit_once(['-', ':']).unwrap_or(("", component));
    (is_container_id(id) && !before.ends_with("-conmon")).then_some(id)
}

const CONTAINER_ID_DIGITS: usize = 64;

/// Whether a container is named by an id, which says no more when it is shown in full.
pub(super) fn is_container_id(text: &str) -> bool {
    text.len() == CONTAINER_ID_DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// `lxc.payload.<name>`; before LXC 4, `lxc/<name>`. `lxc.monitor.<name>` is outside the container.
/// Source: lxc/lxc:src/lxc/cgroups/cgfsng.c; lxc.container.conf(5), lxc.cgroup.dir.
fn lxc_name<'a>(component: &'a str, below: &'a str) -> Option<&'a str> {
    let name = if component == "lxc" { Some(below) } else { component.strip_prefix("lxc.payload.") };
    name.filter(|name| !name.is_empty())
}

/// `systemd-nspawn@<name>.service/payload`, or `machine-<name>.scope/payload`; beside `payload` is `supervisor`, which is
/// outside the container. Source: systemd:src/nspawn/nspawn-cgroup.c, `create_subcgroup`; systemd-nspawn(1), --keep-unit.
fn nspawn_name<'a>(component: &'a str, below: &str) -> Option<&'a str> {
    let strip = |prefix, suffix| component.strip_prefix(prefix)?.strip_suffix(suffix);
    let name = strip("systemd-nspawn@", ".service").or_else(|| strip("machine-", ".scope"));
    name.filter(|_| below == "payload")
}

/// Undoes systemd's escaping of a name: `my\x2dmachine` -> `my-machine`. Source: systemd.unit(5).
fn unescape(name: &str) -> String {
    let mut parts = name.split("\\x");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let escaped = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped.filter(u8::is_ascii) {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(part.get(2..).unwrap_or_default());
            }
            None => {
                plain.push_str("\\x");
                plain.push_str(part);
            }
        }
    }
    plain
}

/// The innermost component that is a service or scope.
fn unit(path: &str) -> Option<&str> {
    path.rsplit('/').find(|component| has_suffix(component, ".service") || has_suffix(component, ".scope"))
}

/// The innermost slice above everything that is none.
fn slice(path: &str) -> Option<&str> {
    let components = path.split('/').filter(|component| !component.is_empty());
    components.take_while(|component| has_suffix(component, ".slice")).last()
}

fn has_suffix(component: &str, suffix: &str) -> bool {
    component.len() > suffix.len() && component.ends_with(suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a process is in a layout, as `/proc/<pid>/cgroup` says it, and who it belongs to. `ID` and `OUTER` stand for
    /// ids, `UID` for a pod's.
    struct Fixture {
        layout: &'static str,
        cgroup: &'static str,
        expect: Expect,
    }

    enum Expect {
        /// The container `ID`.
        Id,
        Name(&'static str),
        Unit(&'static str),
        Nobody,
    }
    use Expect::{Id, Name, Nobody, Unit};

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const OUTER: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
    const UID: &str = "5e5b7d5c-0b6a-4a6e-8f4e-111111111111";

    #[track_caller]
    fn check(fixtures: &[Fixture]) {
        for Fixture { layout, cgroup, expect } in fixtures {
            let cgroup = cgroup.replace("OUTER", OUTER).replace("UID", UID).replace("ID", ID);
            let (container_id, unit) = match expect {
                Id => (Some(ID), None),
                Name(name) => (Some(*name), None),
                Unit(unit) => (None, Some(*unit)),
                Nobody => (None, None),
            };
            let Owner { container_id: found, unit: found_unit, slice } = owner(&cgroup);
            assert_eq!(
                (found.as_deref(), found_unit.as_deref()),
                (container_id, unit),
                "{layout}: {cgroup:?}"
            );
            assert!(container_id.is_none() || slice.is_none(), "{layout}: {cgroup:?} in {slice:?}");
        }
    }

    // Paths as the runtimes' sources build them. They were not seen on running hosts, but for those said to be.

    #[test]
    fn kubernetes_containers_are_found_in_every_layout() {
        check(&[
            Fixture {
                layout: "containerd, cgroupfs driver, v1",
                cgroup: "11:memory:/kubepods/burstable/podUID/ID\n4:cpu,cpuacct:/kubepods/burstable/podUID/ID\n\
                         1:name=systemd:/kubepods/burstable/podUID/ID\n",
                expect: Id,
            },
            Fixture {
                layout: "containerd, cgroupfs driver, hybrid with one hierarchy per controller; seen running",
                cgroup: "9:name=systemd:/kubepods/burstable/podUID/ID\n4:memory:/kubepods/burstable/podUID/ID\n\
                         1:cpu:/kubepods/burstable/podUID/ID\n0::/kubepods/burstable/podUID/ID\n",
                expect: Id,
            },
            Fixture {
                layout: "containerd, cgroupfs driver, hybrid, a runtime that leaves v2 alone",
                cgroup: "4:memory:/kubepods/besteffort/podUID/ID\n1:name=systemd:/kubepods/besteffort/podUID/ID\n\
                         0::/system.slice/containerd.service\n",
                expect: Id,
            },
            Fixture {
                layout: "containerd, cgroupfs driver, v2",
                cgroup: "0::/kubepods/podUID/ID\n",
                expect: Id,
            },
            Fixture {
                layout: "containerd, systemd driver, v1",
                cgroup: "11:memory:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice/\
                         cri-containerd-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "containerd, systemd driver, v2",
                cgroup: "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podUID.slice/\
                         cri-containerd-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "containerd, systemd driver, v2, guaranteed",
                cgroup: "0::/kubepods.slice/kubepods-podUID.slice/cri-containerd-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "containerd told of cgroupfs by a kubelet that means systemd",
                cgroup: "0::/system.slice/containerd.service/kubepods-burstable-podUID.slice:cri-containerd:ID\n",
                expect: Id,
            },
            Fixture {
                layout: "CRI-O, systemd driver, v1",
                cgroup: "9:pids:/kubepods.slice/kubepods-podUID.slice/crio-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "CRI-O, systemd driver, v2, crun's cgroup below the scope",
                cgroup: "0::/kubepods.slice/kubepods-podUID.slice/crio-ID.scope/container\n",
                expect: Id,
            },
            Fixture {
                layout: "CRI-O, cgroupfs driver",
                cgroup: "0::/kubepods/burstable/podUID/crio-ID\n",
                expect: Id,
            },
            Fixture {
                layout: "CRI-O, cgroupfs driver, v1",
                cgroup: "9:pids:/kubepods/besteffort/podUID/crio-ID\n1:name=systemd:/kubepods/besteffort/podUID/crio-ID\n",
                expect: Id,
            },
            Fixture {
                layout: "CRI-O's watcher of a container",
                cgroup: "0::/kubepods.slice/kubepods-podUID.slice/crio-conmon-ID.scope\n",
                expect: Unit(concat!(
                    "crio-conmon-0123456789abcdef0123456789abcdef",
                    "0123456789abcdef0123456789abcdef.scope"
                )),
            },
        ]);
    }

    #[test]
    fn containers_without_kubernetes_are_found_in_every_layout() {
        check(&[
            Fixture {
                layout: "Docker, cgroupfs driver, v1",
                cgroup: "12:pids:/docker/ID\n5:cpu,cpuacct:/docker/ID\n1:name=systemd:/docker/ID\n",
                expect: Id,
            },
            Fixture { layout: "Docker, cgroupfs driver, v2", cgroup: "0::/docker/ID\n", expect: Id },
            Fixture {
                layout: "Docker, cgroupfs driver, v2, removed",
                cgroup: "0::/docker/ID (deleted)\n",
                expect: Id,
            },
            Fixture {
                layout: "Docker, systemd driver, v2",
                cgroup: "0::/system.slice/docker-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "Docker, systemd driver, v1",
                cgroup: "12:pids:/system.slice/docker-ID.scope\n1:name=systemd:/system.slice/docker-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "Docker, systemd in the container",
                cgroup: "0::/system.slice/docker-ID.scope/system.slice/nginx.service\n",
                expect: Id,
            },
            Fixture {
                layout: "Docker, rootless",
                cgroup: "0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "Podman, systemd manager, v2",
                cgroup: "0::/machine.slice/libpod-ID.scope/container\n",
                expect: Id,
            },
            Fixture {
                layout: "Podman, systemd manager, v1",
                cgroup: "8:memory:/machine.slice/libpod-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "Podman, cgroupfs, v1",
                cgroup: "8:memory:/libpod_parent/libpod-ID\n1:name=systemd:/libpod_parent/libpod-ID\n",
                expect: Id,
            },
            Fixture { layout: "Podman, cgroupfs", cgroup: "0::/libpod_parent/libpod-ID\n", expect: Id },
            Fixture {
                layout: "Podman, a pod",
                cgroup: "0::/machine.slice/machine-libpod_pod_OUTER.slice/libpod-ID.scope/container\n",
                expect: Id,
            },
            Fixture {
                layout: "Podman, rootless",
                cgroup: "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope/container\n",
                expect: Id,
            },
            Fixture {
                layout: "Podman, a unit of its own with split cgroups",
                cgroup: "0::/system.slice/web.service/libpod-payload-ID\n",
                expect: Id,
            },
            Fixture {
                layout: "Podman, rootless on v1, where it may not make cgroups",
                cgroup: "1:name=systemd:/user.slice/user-1000.slice/session-3.scope\n",
                expect: Unit("session-3.scope"),
            },
            Fixture { layout: "nerdctl, cgroupfs", cgroup: "0::/default/ID\n", expect: Id },
            Fixture {
                layout: "nerdctl, rootless",
                cgroup: "0::/user.slice/user-1000.slice/user@1000.service/user.slice/nerdctl-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "ctr, cgroupfs, hybrid; seen running",
                cgroup: "5:devices:/k8s.io/ID\n9:name=systemd:/k8s.io/ID\n0::/k8s.io/ID\n",
                expect: Id,
            },
            Fixture { layout: "ctr, a name instead of an id", cgroup: "0::/default/web\n", expect: Nobody },
        ]);
    }

    #[test]
    fn the_innermost_container_wins() {
        check(&[
            Fixture {
                layout: "kind, v2, systemd driver",
                cgroup: "0::/system.slice/docker-OUTER.scope/kubelet.slice/kubelet-kubepods.slice/\
                         kubelet-kubepods-podUID.slice/cri-containerd-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "kind, v1, cgroupfs driver",
                cgroup: "7:memory:/docker/OUTER/kubelet/kubepods/burstable/podUID/ID\n",
                expect: Id,
            },
            Fixture {
                layout: "kind, v1, systemd driver",
                cgroup: "7:memory:/system.slice/docker-OUTER.scope/kubelet.slice/kubelet-kubepods.slice/\
                         kubelet-kubepods-podUID.slice/cri-containerd-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "kind, v2, cgroupfs driver",
                cgroup: "0::/docker/OUTER/kubelet/kubepods/besteffort/podUID/ID\n",
                expect: Id,
            },
            Fixture {
                layout: "kind in Podman, v2, systemd driver",
                cgroup: "0::/machine.slice/libpod-OUTER.scope/container/kubelet.slice/kubelet-kubepods.slice/\
                         kubelet-kubepods-podUID.slice/cri-containerd-ID.scope\n",
                expect: Id,
            },
            Fixture {
                layout: "kind, hybrid, an inner runtime that leaves v2 alone",
                cgroup: "7:memory:/docker/OUTER/kubelet/kubepods/podUID/ID\n1:name=systemd:/docker/OUTER\n\
                         0::/docker/OUTER\n",
                expect: Id,
            },
            Fixture {
                layout: "kind, a service of the node",
                cgroup: "0::/docker/ID/system.slice/containerd.service\n",
                expect: Id,
            },
            Fixture { layout: "Docker in LXC", cgroup: "0::/lxc/101/ns/docker/ID\n", expect: Id },
            Fixture {
                layout: "a sibling, from within a cgroup namespace",
                cgroup: "0::/../cri-containerd-ID.scope\n",
                expect: Id,
            },
        ]);
    }

    #[test]
    fn system_containers_are_known_by_their_names() {
        check(&[
            Fixture {
                layout: "LXC 4, v2",
                cgroup: "0::/lxc.payload.web-1/system.slice/nginx.service\n",
                expect: Name("web-1"),
            },
            Fixture {
                layout: "LXC 3, v1",
                cgroup: "6:pids:/lxc/web/init.scope\n1:name=systemd:/lxc/web/init.scope\n",
                expect: Name("web"),
            },
            Fixture {
                layout: "Proxmox VE",
                cgroup: "0::/lxc/101/ns/system.slice/cron.service\n",
                expect: Name("101"),
            },
            Fixture { layout: "LXC's watcher", cgroup: "0::/lxc.monitor.web\n", expect: Nobody },
            Fixture {
                layout: "systemd-nspawn, a unit of its own",
                cgroup: "0::/machine.slice/systemd-nspawn@web.service/payload/system.slice/nginx.service\n",
                expect: Name("web"),
            },
            Fixture {
                layout: "systemd-nspawn, a scope by systemd-machined, an escaped name",
                cgroup: "0::/machine.slice/machine-web\\x2d1.scope/payload/init.scope\n",
                expect: Name("web-1"),
            },
            Fixture {
                layout: "systemd-nspawn's watcher",
                cgroup: "0::/machine.slice/systemd-nspawn@web.service/supervisor\n",
                expect: Unit("systemd-nspawn@web.service"),
            },
            Fixture {
                layout: "libvirt, a virtual machine",
                cgroup: "0::/machine.slice/machine-qemu\\x2d1\\x2dvm.scope/libvirt/emulator\n",
                expect: Unit("machine-qemu\\x2d1\\x2dvm.scope"),
            },
        ]);
    }

    #[test]
    fn units_are_found_outside_containers() {
        check(&[
            Fixture {
                layout: "service, v2",
                cgroup: "0::/system.slice/ssh.service\n",
                expect: Unit("ssh.service"),
            },
            Fixture {
                layout: "service, v1, only systemd's own hierarchy",
                cgroup: "4:cpu:/\n1:name=systemd:/system.slice/cron.service\n",
                expect: Unit("cron.service"),
            },
            Fixture {
                layout: "service, hybrid, controllers enabled for the slice only",
                cgroup: "4:memory:/system.slice\n1:name=systemd:/system.slice/cron.service\n\
                         0::/system.slice/cron.service\n",
                expect: Unit("cron.service"),
            },
            Fixture {
                layout: "service with cgroups of its own",
                cgroup: "0::/system.slice/systemd-udevd.service/udev\n",
                expect: Unit("systemd-udevd.service"),
            },
            Fixture {
                layout: "session of a user",
                cgroup: "0::/user.slice/user-0.slice/session-3.scope\n",
                expect: Unit("session-3.scope"),
            },
            Fixture {
                layout: "desktop program of a user",
                cgroup: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.gnome.Maps-77.scope\n",
                expect: Unit("app-org.gnome.Maps-77.scope"),
            },
            Fixture {
                layout: "service of a user",
                cgroup: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/dbus.service\n",
                expect: Unit("dbus.service"),
            },
            Fixture { layout: "systemd itself", cgroup: "0::/init.scope\n", expect: Unit("init.scope") },
            Fixture {
                layout: "service that is named after something hashed",
                cgroup: "0::/system.slice/build-ID.service\n",
                expect: Unit(concat!(
                    "build-0123456789abcdef0123456789abcdef",
                    "0123456789abcdef0123456789abcdef.service"
                )),
            },
        ]);
    }

    #[test]
    fn slices_are_those_of_the_systems_own_manager() {
        for (cgroup, expect) in [
            ("0::/system.slice/ssh.service\n", Some("system.slice")),
            ("0::/system.slice/system-getty.slice/getty@tty1.service\n", Some("system-getty.slice")),
            ("0::/user.slice/user-1000.slice/session-3.scope\n", Some("user-1000.slice")),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/a.service\n",
                Some("user-1000.slice"),
            ),
            ("0::/system.slice\n", Some("system.slice")),
            ("4:memory:/\n1:name=systemd:/system.slice/cron.service\n0::/\n", Some("system.slice")),
            ("0::/init.scope\n", None),
            ("0::/.slice\n", None),
            ("0::/\n", None),
        ] {
            assert_eq!(owner(cgroup).slice.as_deref(), expect, "{cgroup:?}");
        }
    }

    #[test]
    fn the_root_has_no_owner() {
        check(&[
            Fixture {
                layout: "root, or the root of the agent's own namespace",
                cgroup: "0::/\n",
                expect: Nobody,
            },
            Fixture { layout: "nothing could be read", cgroup: "", expect: Nobody },
            Fixture { layout: "no line of cgroups(7)", cgroup: "garbage", expect: Nobody },
            Fixture { layout: "nothing behind LXC's own cgroup", cgroup: "0::/lxc\n", expect: Nobody },
        ]);
    }

    #[test]
    fn names_are_unescaped_as_systemd_escapes_them() {
        for (name, expect) in [
            ("web", "web"),
            (r"a\x2db\x2dc", "a-b-c"),
            (r"\x5cx2d", r"\x2d"),
            (r"half\x2", r"half\x2"),
            (r"no\xzz", r"no\xzz"),
        ] {
            assert_eq!(unescape(name), expect);
        }
    }
}
