//! What the agent does besides sampling: one agent per node, listening, switching off and on, new configurations.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::{
    Signals,
    config::{Config, ConfigError},
    http::{self, Front},
    instance::{self, Lock, Try},
    ledger::ProfileType,
    logs::Logs,
    pipeline::{Pipeline, Stopped},
    reload::Reloader,
    status::Phase,
    sys::cgroup::WholeV2,
    targets::Targets,
};

/// Time between two tries to get the lock of another agent.
const LOCK_INTERVAL: Duration = Duration::from_millis(500);

/// Waits until no other agent runs, and says so once. `None` when it is told to end meanwhile.
pub(crate) async fn lock(
    config: &Config,
    doors: &mut Doors,
    front: &Front,
    signals: &mut Signals,
) -> anyhow::Result<Option<Lock>> {
    let mut is_told = false;
    loop {
        let pid = match Lock::try_take(&config.run_dir, config.instance.as_deref())? {
            Try::Taken(lock) => return Ok(Some(lock)),
            Try::Held(pid) => pid,
        };
        if !is_told {
            is_told = true;
            let pid = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
            let run_dir = config.run_dir.display();
            let why = format!("another agent{pid} holds the lock in {run_dir}");
            warn!("{why}: waiting for its end; --instance gives an agent a lock of its own");
            front.set_phase(Phase::Waiting(why));
            // The other one may have the addresses, too. Then nobody answers here, which is not ready as well.
            let _ = doors.open().await;
        }
        tokio::select! {
            () = signals.end() => return Ok(None),
            () = tokio::time::sleep(LOCK_INTERVAL) => {}
        }
    }
}

/// The agent's own listeners.
pub(crate) struct Doors {
    config: Config,
    front: Front,
    own: Option<JoinHandle<std::io::Result<()>>>,
    metrics: Option<JoinHandle<std::io::Result<()>>>,
}

impl Doors {
    /// None is open yet.
    pub(crate) fn new(config: &Config, front: Front) -> Self {
        Self { config: config.clone(), front, own: None, metrics: None }
    }

    /// Opens those that are not open, and says where they are.
    pub(crate) async fn open(&mut self) -> anyhow::Result<()> {
        if self.own.is_none() {
            let (listener, address) = bind(self.config.listen, "--listen").await?;
            info!("own metrics: http://{address}/metrics; Ctrl-C stops");
            let (front, config) = (self.front.clone(), self.config.clone());
            self.own = Some(tokio::spawn(async move { http::serve(listener, front, &config).await }));
        }
        if let (None, Some(listen)) = (&self.metrics, self.config.metrics_listen) {
            let (listener, address) = bind(listen, "--metrics-listen").await?;
            info!("metrics and health only: http://{address}/metrics");
            let (front, config) = (self.front.clone(), self.config.clone());
            self.metrics =
                Some(tokio::spawn(async move { http::serve_metrics(listener, front, &config).await }));
        }
        Ok(())
    }

    /// Whether one has ended by itself.
    pub(crate) fn are_dead(&self) -> bool {
        self.own.iter().chain(&self.metrics).any(JoinHandle::is_finished)
    }
}

async fn bind(listen: SocketAddr, flag: &str) -> anyhow::Result<(tokio::net::TcpListener, SocketAddr)> {
    let listener = http::bind(listen)
        .await
        .with_context(|| format!("listen on {listen} (another agent? choose with {flag})"))?;
    let address = listener.local_addr().context("read own address")?;
    Ok((listener, address))
}

/// Refuses targets that could never match on this machine.
fn check_targets(targets: &Targets) -> Result<(), ConfigError> {
    let Some(cgroup) = targets.cgroups().next() else { return Ok(()) };
    if WholeV2::find("/proc".as_ref()).is_some() {
        return Ok(());
    }
    let accepted =
        "no cgroup v2 hierarchy is here, or none that leads to its root; accepted: a target's pid or comm";
    Err(ConfigError::new("target", &cgroup.display().to_string(), accepted.to_owned()))
}

/// The stages, and whoever tells them what to do.
pub(crate) struct Supervisor {
    pipeline: Pipeline,
    reloader: Reloader,
    front: Front,
    logs: Logs,
    /// Why nothing is attached; `Some` before the first look.
    paused: Option<String>,
}

impl Supervisor {
    /// Of stages that do not sample yet.
    pub(crate) fn new(pipeline: Pipeline, reloader: Reloader, front: Front, logs: Logs) -> Self {
        Self { pipeline, reloader, front, logs, paused: Some("starting".to_owned()) }
    }

    /// The stages.
    pub(crate) fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Attaches to the kernel or detaches, as the configuration and the off switch want it.
    pub(crate) fn look_at_switch(&mut self) -> anyhow::Result<()> {
        let wanted = instance::pause_reason(self.reloader.running());
        if wanted == self.paused {
            return Ok(());
        }
        match &wanted {
            Some(why) => {
                self.pipeline.pause();
                info!("paused: {why}: nothing is attached to the kernel");
                self.front.set_phase(Phase::Paused(why.clone()));
            }
            None => {
                self.pipeline.resume()?;
                info!("sampling on {} CPUs", self.pipeline.cpus());
                self.front.set_phase(Phase::Sampling);
            }
        }
        self.paused = wanted;
        Ok(())
    }

    /// Looks at the file and the switch. The reason why the agent cannot go on, if there is one.
    pub(crate) fn look(&mut self) -> Option<String> {
        if self.reloader.file_has_changed() {
            self.reload();
        }
        self.look_at_switch().err().map(|error| format!("{error:#}"))
    }

    /// Reads the configuration again. A bad one changes nothing.
    pub(crate) fn reload(&mut self) {
        let change = match self.reloader.reload(|new| check_targets(&new.targets)) {
            Ok(change) => change,
            Err(error) => {
                self.count_reload(false);
                warn!("the new configuration is refused, the old one stays: {error}");
                return;
            }
        };
        self.count_reload(true);
        if change.live.is_empty() && change.after_restart.is_empty() {
            info!("configuration read again: nothing has changed");
        }
        for key in change.live {
            self.apply(key);
            info!("{key} is changed");
        }
        for key in change.after_restart {
            warn!("{key} has another value now, which takes effect with a restart");
        }
        self.front.set_config(self.reloader.show(), self.reloader.running());
    }

    /// Makes the new value of a key that can change while the agent runs take effect.
    fn apply(&mut self, key: &str) {
        let config = self.reloader.running();
        match key {
            "frequency" => {
                if let Err(error) = self.pipeline.set_frequency(config.frequency_hz) {
                    warn!(error = %format!("{:#}", anyhow::Error::from(error)), "change the sampling frequency");
                }
            }
            "labels" => self.pipeline.set_labels(&config.node, &config.labels),
            "heap" | "heap_budget" => self.pipeline.set_heap(config),
            // Both keys are in the one list.
            "target" | "target_default" => {
                if let Err(error) = self.pipeline.set_targets(&config.targets) {
                    warn!(error = %format!("{:#}", anyhow::Error::from(error)), "change the targets");
                }
            }
            "profiles" => {
                let page_faults = config.takes(ProfileType::PageFaults);
                let set = self.pipeline.set_cpu(config.takes(ProfileType::Cpu));
                if let Err(error) = set.and_then(|()| self.pipeline.set_page_faults(page_faults)) {
                    warn!(error = %format!("{:#}", anyhow::Error::from(error)), "change the kinds of profiles");
                }
            }
            // It was checked when it was read.
            "log" => drop(self.logs.set_filter(&config.log)),
            // The switch is looked at after every reload.
            _ => debug_assert_eq!(key, "enabled"),
        }
    }

    fn count_reload(&self, is_accepted: bool) {
        self.pipeline.view().shared.gauges.count_reload(is_accepted);
    }

    /// Follows the CPUs and what the BPF programs say, and names a part of the agent that has died.
    pub(crate) fn check(&mut self) -> Option<String> {
        self.pipeline.follow_cpus();
        self.pipeline.forward_messages();
        if self.paused.is_none() {
            self.pipeline.keep_to_budget();
        }
        self.pipeline.dead_stage().map(|stage| format!("stage {stage} died"))
    }

    /// Stops sampling, lets every stage finish what it has, and gives the final account.
    pub(crate) fn stop(self, runtime: &tokio::runtime::Handle) -> Stopped {
        self.pipeline.stop(runtime)
    }
}
