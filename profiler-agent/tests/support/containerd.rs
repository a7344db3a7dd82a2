//! Runs containers as a kubelet does: through the CRI plugin of a containerd.
//!
//! The containerd is the test's own. Its socket, images and state are in a temporary directory; it and its containers
//! run below a cgroup that is cleared at the end, also when the test fails. Pods use the host's network, so that no
//! network plugin is needed, and images are made here, so that no registry is.

use std::{
    collections::HashMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use axum::{body::Bytes, http::Request};
use prost::Message;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    cgroups::Cgroups,
    support::{is_emulated, patience, run, testprogs},
};

/// How long the daemon may take to answer for the first time.
const PATIENCE: Duration = Duration::from_secs(60);
/// What all containers are made of: `burn`, statically linked.
const BURN_IMAGE: &str = "localhost/burn:1";
/// What holds the namespaces of a pod.
const PAUSE_IMAGE: &str = "localhost/pause:1";
/// The namespace of containerd that the CRI plugin looks in.
const NAMESPACE: &str = "k8s.io";

/// A running containerd with its containers.
pub(crate) struct Containerd {
    daemon: Child,
    directory: tempfile::TempDir,
    cgroups: Cgroups,
    runtime: tokio::runtime::Runtime,
}

/// A container that runs `burn`.
pub(crate) struct Container {
    /// 64 hexadecimal digits.
    pub(crate) id: String,
    /// In the pid namespace of the test.
    pub(crate) pid: u32,
}

impl Containerd {
    /// Starts the daemon, waits until it answers, and gives it the images.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let cgroups = Cgroups::new();
        let config = directory.path().join("config.toml");
        fs::write(&config, configuration(directory.path())).expect("write the configuration");
        let script =
            format!("{} exec containerd --config '{}'", cgroups.moves("containerd"), config.display());
        let daemon = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.path().join("log")).expect("a log file"))
            .spawn()
            .expect("a shell starts");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let containerd = Self { daemon, directory, cgroups, runtime };
        containerd.wait_until_it_answers();
        containerd.import_images();
        containerd
    }

    /// The cgroup that all containers are in: for programs that run beside them.
    pub(crate) fn cgroups(&self) -> &Cgroups {
        &self.cgroups
    }

    /// Starts a pod with one container, in the cgroup a kubelet would choose for it.
    pub(crate) fn run(&self, pod: &str, uid: &str) -> Container {
        let config = PodConfig {
            metadata: Some(PodMetadata { name: pod.into(), uid: uid.into(), namespace: "default".into() }),
            linux: Some(PodLinux {
                cgroup_parent: format!("{}/kubepods/burstable/pod{uid}", self.cgroups.path()),
                security: Some(PodSecurity { namespaces: Some(Namespaces { network: NAMESPACE_OF_NODE }) }),
            }),
        };
        let sandbox: Id = self.call("RunPodSandbox", &RunPod { config: Some(config.clone()) });
        let create = CreateContainer {
            pod_id: sandbox.id,
            config: Some(ContainerConfig {
                metadata: Some(ContainerMetadata { name: "burn".into() }),
                image: Some(ImageSpec { image: BURN_IMAGE.into() }),
            }),
            pod: Some(config),
        };
        let container: Id = self.call("CreateContainer", &create);
        self.call::<Empty>("StartContainer", &container);
        let pid = self.pid(&container.id);
        Container { id: container.id, pid }
    }

    /// Kills a container and removes it, with its cgroup and its file system.
    pub(crate) fn kill(&self, container: &Container) {
        let id = container.id.clone();
        self.call::<Empty>("StopContainer", &StopContainer { id: id.clone(), timeout_s: 0 });
        self.call::<Empty>("RemoveContainer", &Id { id });
    }

    /// The pid is in the plugin's own words only, which come as JSON.
    fn pid(&self, container: &str) -> u32 {
        let request = StatusRequest { id: container.into(), verbose: true };
        let status: ContainerStatus = self.call("ContainerStatus", &request);
        let info: Value = serde_json::from_str(&status.info["info"]).expect("JSON");
        info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a running container has a pid")
    }

    fn wait_until_it_answers(&self) {
        let end = patience::end_of(PATIENCE);
        while let Err(error) = self.try_call::<Empty>("Status", &Empty {}) {
            assert!(Instant::now() < end, "containerd never answers: {error}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn import_images(&self) {
        let archive = image_archive(self.directory.path());
        let (socket, archive) = (self.socket(), archive.display().to_string());
        let socket = socket.display().to_string();
        run("ctr", &["--address", &socket, "--namespace", NAMESPACE, "images", "import", &archive]);
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn call<Answer: Message + Default>(&self, method: &str, request: &impl Message) -> Answer {
        self.try_call(method, request)
            .unwrap_or_else(|error| panic!("{method}: {error}\n--- containerd's log\n{}", self.log()))
    }

    fn try_call<Answer: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Answer, Box<dyn Error>> {
        let answer = self.runtime.block_on(unary_call(&self.socket(), method, &request.encode_to_vec()))?;
        Ok(Answer::decode(&*answer)?)
    }

    fn remove_pods(&self) -> Result<(), Box<dyn Error>> {
        for pod in self.try_call::<PodList>("ListPodSandbox", &Empty {})?.pods {
            self.try_call::<Empty>("StopPodSandbox", &pod)?;
            self.try_call::<Empty>("RemovePodSandbox", &pod)?;
        }
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Err(error) = self.remove_pods() {
            eprintln!("pods are removed by force: {error}");
        }
        self.cgroups.clear();
        // It has been killed with its cgroup, unless it never got there.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        unmount_below(self.directory.path());
    }
}

/// Unmounts what killed containers have left in a directory, the latest first.
fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|mount| mount.split(' ').nth(1));
    let own: Vec<_> = points.filter(|point| Path::new(point).starts_with(directory)).collect();
    for point in own.iter().rev() {
        run("umount", &[point]);
    }
}

/// As a node has it, but for the paths, and for what an unprivileged or a nested machine cannot do: write to `/opt`,
/// lower an OOM score. Source: containerd/docs/cri/config.md, version 2.
fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    // The virtual machines' kernels have no module of a layered file system, and their root is what the kernel unpacked,
    // which no process can leave by pivot_root(2).
    let (snapshotter, no_pivot_root) = if is_emulated() { ("native", true) } else { ("overlayfs", false) };
    format!(
        r#"version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{directory}/sock"
[ttrpc]
address = "{directory}/sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{directory}/cni"
conf_dir = "{directory}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{directory}/runc"
NoPivotRoot = {no_pivot_root}
"#
    )
}

/// Both images in one archive; they share their only layer. Source: OCI image-spec, image-layout.md.
fn image_archive(directory: &Path) -> PathBuf {
    let layout = directory.join("image");
    fs::create_dir_all(layout.join("blobs/sha256")).expect("a directory for the image");
    let layer = directory.join("layer.tar");
    pack(&testprogs().join("container"), &layer);
    let layer = fs::read(layer).expect("the layer");
    let layer = blob(&layout, "application/vnd.oci.image.layer.v1.tar", &layer);
    let manifests = [(BURN_IMAGE, "/burn"), (PAUSE_IMAGE, "/pause")].map(|(name, entrypoint)| {
        let mut manifest = manifest(&layout, &layer, entrypoint);
        manifest["annotations"] = json!({ "io.containerd.image.name": name });
        manifest
    });
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    fs::write(layout.join("index.json"), index.to_string()).expect("write the index");
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write the version");
    let archive = directory.join("image.tar");
    pack(&layout, &archive);
    archive
}

fn manifest(layout: &Path, layer: &Value, entrypoint: &str) -> Value {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Entrypoint": [entrypoint] },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob(layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer] });
    blob(layout, media_type, manifest.to_string().as_bytes())
}

/// Stores a blob under its digest, and describes it.
fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let digest = format!("{:x}", Sha256::digest(bytes));
    fs::write(layout.join("blobs/sha256").join(&digest), bytes).expect("write a blob");
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() })
}

fn pack(directory: &Path, archive: &Path) {
    assert!(directory.exists(), "{} is not there: run cargo xtask testprogs", directory.display());
    let (directory, archive) = (directory.display().to_string(), archive.display().to_string());
    run("tar", &["--create", "--file", &archive, "--directory", &directory, "."]);
}

/// Calls a method of the runtime service and gives the answer's message.
///
/// Source: grpc/doc/PROTOCOL-HTTP2.md: a message is preceded by one byte that says whether it is compressed, and its
/// length in four.
async fn unary_call(socket: &Path, method: &str, message: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let request = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut body) = client.send_request(request, false)?;
    let length = u32::try_from(message.len())?.to_be_bytes();
    body.send_data(Bytes::from([&[0], &length[..], message].concat()), true)?;

    let (head, mut body) = response.await?.into_parts();
    let mut answer = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        answer.extend_from_slice(&chunk);
    }
    // A call that fails has its status in the head, there being no body.
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    if trailers.get("grpc-status").is_none_or(|status| status != "0") {
        return Err(format!("{trailers:?}").into());
    }
    Ok(answer.split_off(1 + length.len()))
}

// What is used of the messages. Source: kubernetes/cri-api/pkg/apis/runtime/v1/api.proto.

/// `NamespaceMode.NODE`.
const NAMESPACE_OF_NODE: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct Empty {}

/// Requests and answers that name a pod or a container, and nothing else that matters.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodList {
    #[prost(message, repeated, tag = "1")]
    pods: Vec<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPod {
    #[prost(message, optional, tag = "1")]
    config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct PodConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodMetadata>,
    #[prost(message, optional, tag = "8")]
    linux: Option<PodLinux>,
}

#[derive(Clone, PartialEq, Message)]
struct PodMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodLinux {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security: Option<PodSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSecurity {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct Namespaces {
    #[prost(int32, tag = "1")]
    network: i32,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    pod_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pod: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct StopContainer {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(int64, tag = "2")]
    timeout_s: i64,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(bool, tag = "2")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatus {
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}
