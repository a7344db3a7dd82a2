//! From a process's cgroup path to the container or systemd unit it belongs to.

/// What a cgroup path says about who runs in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Owner {
    /// 64 hexadecimal digits, as containerd, CRI-O, Docker and Podman name containers; the innermost when nested.
    pub(crate) container_id: Option<String>,
    /// Systemd service or scope outside containers, the innermost.
    pub(crate) unit: Option<String>,
}

/// Reads `/proc/<pid>/cgroup`. Source: cgroups(7): one `id:controllers:path` line per hierarchy.
///
/// Controllers may be in different hierarchies (v1, hybrid). The first hierarchy that names a container wins; else the
/// first that names a unit, with systemd's own (`name=systemd`) and the v2 one (`0::`) before the others.
pub(crate) fn owner(cgroup: &str) -> Owner {
    let mut lines: Vec<_> = cgroup.lines().filter_map(parse_line).collect();
    lines.sort_by_key(|&(controllers, _)| !matches!(controllers, "" | "name=systemd"));
    let container_id = lines.iter().find_map(|(_, path)| container_id(path));
    let unit = match container_id {
        Some(_) => None,
        None => lines.iter().find_map(|(_, path)| unit(path)),
    };
    Owner { container_id: container_id.map(str::to_owned), unit: unit.map(str::to_owned) }
}

fn parse_line(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(':')?;
    rest.split_once(':')
}

/// The innermost path component that is, or ends in, a container id:
/// `/docker/<id>`, `/system.slice/docker-<id>.scope`, `/kubepods/burstable/pod<uid>/<id>`, `cri-containerd-<id>.scope`,
/// `crio-<id>.scope`, `libpod-<id>.scope`, `/…/kubepods-pod<uid>.slice:cri-containerd:<id>`.
fn container_id(path: &str) -> Option<&str> {
    path.rsplit('/').find_map(|component| {
        let component = component.strip_suffix(".scope").unwrap_or(component);
        let last = component.rsplit(['-', ':']).next().unwrap_or(component);
        is_container_id(last).then_some(last)
    })
}

const CONTAINER_ID_DIGITS: usize = 64;

fn is_container_id(text: &str) -> bool {
    text.len() == CONTAINER_ID_DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The innermost component that is a service, scope or slice.
fn unit(path: &str) -> Option<&str> {
    path.rsplit('/').find(|component| {
        [".service", ".scope", ".slice"]
            .iter()
            .any(|suffix| component.len() > suffix.len() && component.ends_with(suffix))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[track_caller]
    fn check(cgroup: &str, container_id: Option<&str>, unit: Option<&str>) {
        let expect = Owner { container_id: container_id.map(str::to_owned), unit: unit.map(str::to_owned) };
        assert_eq!(owner(cgroup), expect, "{cgroup:?}");
    }

    #[test]
    fn containers_are_found_in_every_layout() {
        for path in [
            format!("/docker/{ID}"),
            format!("/system.slice/docker-{ID}.scope"),
            format!("/kubepods/burstable/pod5e5b7d5c-0b6a-4a6e-8f4e-111111111111/{ID}"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/cri-containerd-{ID}.scope"
            ),
            format!("/kubepods.slice/crio-{ID}.scope/container"),
            format!("/machine.slice/libpod-{ID}.scope"),
            format!("/system.slice/containerd.service/kubepods-podx.slice:cri-containerd:{ID}"),
        ] {
            check(&format!("0::{path}\n"), Some(ID), None);
        }
    }

    #[test]
    fn the_innermost_container_wins() {
        let outer = ID.replace('0', "f");
        check(&format!("0::/docker/{outer}/kubepods/podx/{ID}\n"), Some(ID), None);
    }

    #[test]
    fn on_hybrid_hosts_any_hierarchy_may_name_the_container() {
        check(&format!("5:memory:/k8s.io/{ID}\n1:name=systemd:/\n0::/\n"), Some(ID), None);
    }

    #[test]
    fn units_are_found_outside_containers() {
        check("0::/system.slice/ssh.service\n", None, Some("ssh.service"));
        check("0::/user.slice/user-0.slice/session-3.scope\n", None, Some("session-3.scope"));
        check("4:cpu:/\n1:name=systemd:/system.slice/cron.service\n", None, Some("cron.service"));
    }

    #[test]
    fn the_root_has_no_owner() {
        check("0::/\n", None, None);
        check("", None, None);
        check("garbage", None, None);
    }
}
