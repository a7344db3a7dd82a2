//! Asks the running agent by its own HTTP.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, bail};
use profiler_backend::Token;
use reqwest::{Client, Url};

use crate::config::Config;

/// An agent that does not answer within this time does not run.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer that are taken: many times the longest.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The agent that has this configuration.
pub(super) struct Agent {
    client: Client,
    address: SocketAddr,
    token: Option<Token>,
    backend_token: Option<Token>,
}

impl Agent {
    pub(super) fn new(config: &Config) -> anyhow::Result<Self> {
        let client =
            Client::builder().no_proxy().timeout(TIMEOUT).build().context("set up the HTTP client")?;
        Ok(Self {
            client,
            address: reachable(config.listen),
            token: config.token.clone(),
            backend_token: config.backend_token.clone(),
        })
    }

    /// The body of the agent's answer to a path.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let address = self.address;
        let url = Url::parse(&format!("http://{address}{path}")).context("make a URL")?;
        self.fetch(url, self.token.as_ref()).await.with_context(|| {
            format!("no agent answers at {address}: it does not run, or with another --listen")
        })
    }

    /// The body of an answer of the embedded backend.
    pub(super) async fn get_of_backend(&self, url: Url) -> anyhow::Result<Vec<u8>> {
        self.fetch(url, self.backend_token.as_ref()).await
    }

    async fn fetch(&self, url: Url, token: Option<&Token>) -> anyhow::Result<Vec<u8>> {
        let mut request = self.client.get(url);
        if let Some(token) = token {
            request = request.bearer_auth(token.text());
        }
        let mut response = request.send().await?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            body.extend_from_slice(&chunk);
            if body.len() > ANSWER_BYTES_MAX {
                bail!("an answer of more than {ANSWER_BYTES_MAX} bytes");
            }
        }
        if !status.is_success() {
            bail!("{status}: {}", String::from_utf8_lossy(&body).trim());
        }
        Ok(body)
    }
}

/// Where one reaches from here what listens on all addresses.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let loopback: IpAddr = match listen {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    if listen.ip().is_unspecified() { (loopback, listen.port()).into() } else { listen }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_listens_everywhere_is_asked_on_loopback() {
        let check = |listen: &str, expect: &str| {
            let listen = listen.parse().expect("an address");
            assert_eq!(reachable(listen).to_string(), expect);
        };
        check("0.0.0.0:7701", "127.0.0.1:7701");
        check("[::]:7701", "[::1]:7701");
        check("10.0.0.7:1", "10.0.0.7:1");
    }
}
