//! The support bundle: one tar of texts, without secrets.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use flate2::{Compression, write::GzEncoder};
use reqwest::Url;

use super::ask::Agent;
use crate::{
    config::{Config, Sources},
    doctor::{self, Host},
    status::Report,
};

/// What the running agent answers, and what it is called in the bundle.
const ANSWERS: [(&str, &str); 7] = [
    ("/status?format=json", "status.json"),
    ("/targets?format=json", "targets.json"),
    ("/binaries", "binaries.json"),
    ("/metrics", "metrics.txt"),
    ("/config", "config-running.toml"),
    ("/bpf", "bpf.txt"),
    ("/logs", "logs.txt"),
];
/// How much of the agent's own profile goes in.
const PROFILE_FROM: &str = "now-15m";

/// Writes the bundle. Gives the parts that it could not have, and why.
pub(super) async fn write(path: &Path, sources: &Sources, config: &Config) -> anyhow::Result<Vec<String>> {
    // Labels and names of processes are nobody else's.
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    let file = file.with_context(|| format!("create {}", path.display()))?;
    let mut tar = Tar::new(file);
    let host = Host { proc: "/proc".as_ref(), sys: "/sys".as_ref() };
    tar.add("doctor.txt", doctor::examine(host).to_string().as_bytes())?;
    tar.add("config.toml", sources.show(config)?.as_bytes())?;
    let agent = Agent::new(config)?;
    let mut missing = Vec::new();
    for (question, name) in ANSWERS {
        match agent.get(question).await {
            Ok(answer) => tar.add(name, &answer)?,
            Err(error) => missing.push(format!("{name}: {error:#}")),
        }
    }
    match own_profile(&agent).await {
        Ok(profile) => tar.add("profile.pb.gz", &profile)?,
        Err(error) => missing.push(format!("profile.pb.gz: {error:#}")),
    }
    tar.add("left-out.txt", missing.iter().map(|part| format!("{part}\n")).collect::<String>().as_bytes())?;
    tar.finish()?;
    Ok(missing)
}

/// The agent's profile of itself, as pprof.
async fn own_profile(agent: &Agent) -> anyhow::Result<Vec<u8>> {
    let status = agent.get("/status?format=json").await?;
    let report: Report = serde_json::from_slice(&status).context("read the agent's status")?;
    let backend = report.backend.context("the agent keeps no profiles: it sends them to another backend")?;
    let mut url = Url::parse(&format!("http://{backend}/api/v1/merge")).context("make a URL")?;
    url.query_pairs_mut()
        .append_pair("type", "cpu")
        .append_pair("format", "pprof")
        .append_pair("from", PROFILE_FROM)
        .append_pair("query", "{exe=\"profiler-agent\"}");
    agent.get_of_backend(url).await
}

/// A compressed tar in the making.
struct Tar {
    builder: tar::Builder<GzEncoder<File>>,
    unix_seconds: u64,
}

impl Tar {
    fn new(file: File) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let builder = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        Self { builder, unix_seconds: now.as_secs() }
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.unix_seconds);
        let path = format!("profiler-support/{name}");
        self.builder.append_data(&mut header, path, bytes).with_context(|| format!("pack {name}"))
    }

    fn finish(self) -> anyhow::Result<()> {
        let gzip = self.builder.into_inner().context("finish the bundle")?;
        let mut file = gzip.finish().context("finish the bundle")?;
        file.flush().context("finish the bundle")
    }
}
