//! Registers with an agent, and stays registered.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use portcullis_core::Address;
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};

use super::answer;
use super::client::{Client, Path};
use crate::backoff::Backoff;
use crate::registry::Pending;
use crate::{CheckKind, Error, Health, HealthCheck, Membership, Registration, ServiceDefinition};

/// Keeps one instance registered: the task behind a [`Registration`].
struct Keeper {
    client: Arc<Client>,
    definition: ServiceDefinition,
    maintenance: Option<String>,
    /// The agent was not told of it yet, or has forgotten.
    owes_maintenance: bool,
    health: Health,
    note: String,
}

struct Handle(mpsc::Sender<(Command, oneshot::Sender<Result<(), Error>>)>);

enum Command {
    Deregister,
    Maintenance(Option<String>),
    Report(Health, String),
    Confirm,
}

pub(super) async fn register(client: Arc<Client>, definition: ServiceDefinition) -> Result<Registration, Error> {
    let (service, id) = (definition.service.clone(), definition.instance.id.clone());
    if service.is_empty() || id.is_empty() {
        return Err(Error::invalid("a registration needs a service and an id"));
    }
    let keeper = Keeper {
        client,
        definition,
        maintenance: None,
        owes_maintenance: false,
        health: Health::Passing,
        note: String::new(),
    };
    let (handle, commands) = mpsc::channel(8);
    let (done, registered) = oneshot::channel();
    // In the task, so that a caller who gives up leaves nothing registered: the task then sees the handle gone.
    tokio::spawn(async move {
        let result = keeper.put().await;
        let failed = result.is_err();
        if result.as_ref().is_err_and(|error| !(error.is_invalid() || error.is_denied())) {
            // It may have arrived although the answer did not. Before anybody hears of it, who may try again under this id.
            let _ = keeper.deregister().await;
        }
        let _ = done.send(result);
        if !failed {
            keeper.run(commands).await;
        }
    });
    registered.await.map_err(|_| Error::unavailable("the runtime is gone"))??;
    tracing::info!(service = &*service, id = &*id, "registered");
    Ok(Registration::new(service, id, Handle(handle)))
}

// === impl Keeper ===

impl Keeper {
    /// Beats and compares until it is told to stop, or the handle is dropped.
    async fn run(mut self, mut commands: mpsc::Receiver<(Command, oneshot::Sender<Result<(), Error>>)>) {
        let mut backoff = Backoff::new();
        let (service, id) = (self.definition.service.clone(), self.definition.instance.id.clone());
        let beat = self.beat_every();
        // Apart from the commands, or who sends many would keep it from beating.
        let next = tokio::time::sleep(if self.has_ttl() { Duration::ZERO } else { beat });
        tokio::pin!(next);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some((Command::Deregister, done)) => {
                        let result = self.deregister().await;
                        // Who asked may be gone.
                        let _ = done.send(result);
                        return;
                    }
                    Some((Command::Maintenance(reason), done)) => {
                        (self.maintenance, self.owes_maintenance) = (reason, true);
                        let _ = done.send(self.maintain().await);
                    }
                    Some((Command::Report(health, note), done)) => {
                        (self.health, self.note) = (health, note);
                        let result = if self.has_ttl() {
                            self.report().await
                        } else {
                            Err(Error::invalid("the instance has no check in which it reports by itself"))
                        };
                        let _ = done.send(result);
                    }
                    Some((Command::Confirm, done)) => {
                        let _ = done.send(self.beat().await);
                    }
                    None => {
                        if let Err(error) = self.deregister().await {
                            tracing::warn!(service = &*service, id = &*id, %error, "could not deregister a dropped registration");
                        }
                        return;
                    }
                },
                () = &mut next => {
                    let began = tokio::time::Instant::now();
                    let pause = match self.beat().await {
                        Ok(()) => {
                            backoff.reset();
                            // However long it took: three fit into the time to live.
                            beat.saturating_sub(began.elapsed())
                        }
                        Err(error) => {
                            tracing::warn!(service = &*service, id = &*id, %error, "the registration could not be confirmed");
                            backoff.next(fastrand::f64()).min(beat)
                        }
                    };
                    next.as_mut().reset(tokio::time::Instant::now() + pause);
                }
            }
        }
    }

    /// Three beats in the shortest time to live, or one comparison.
    fn beat_every(&self) -> Duration {
        let shortest = self.ttls().map(|(_, check)| check.interval).min();
        let resync = self.client.config.resync;
        shortest.map_or(resync, |ttl| (ttl / 3).min(resync)).max(Duration::from_millis(10))
    }

    fn ttls(&self) -> impl Iterator<Item = (usize, &HealthCheck)> {
        self.definition.checks.iter().enumerate().filter(|(_, check)| check.kind == CheckKind::Ttl)
    }

    fn has_ttl(&self) -> bool {
        self.ttls().next().is_some()
    }

    /// Reports, and registers anew if the agent forgot.
    async fn beat(&mut self) -> Result<(), Error> {
        let id = &self.definition.instance.id;
        let path = Path::new("/v1/agent/service/").segment(id);
        let known = self.client.keep(Method::GET, path, Bytes::new()).await?;
        if known.status == StatusCode::NOT_FOUND {
            tracing::info!(
                service = &*self.definition.service,
                id = &**id,
                "the agent forgot the registration, registering anew"
            );
            self.put().await?;
            self.owes_maintenance = self.maintenance.is_some();
        } else {
            known.ok()?;
        }
        if self.owes_maintenance {
            self.maintain().await?;
        }
        self.report().await
    }

    async fn report(&self) -> Result<(), Error> {
        let body = Bytes::from(json!({ "Status": status(self.health), "Output": self.note }).to_string());
        for (number, _) in self.ttls() {
            let path = Path::new("/v1/agent/check/update/").segment(&self.check_id(number));
            self.client.keep(Method::PUT, path, body.clone()).await?.ok()?;
        }
        Ok(())
    }

    async fn maintain(&mut self) -> Result<(), Error> {
        let path = Path::new("/v1/agent/service/maintenance/").segment(&self.definition.instance.id);
        let path = match &self.maintenance {
            Some(reason) => path.query("enable", "true").query("reason", reason),
            None => path.query("enable", "false"),
        };
        self.client.keep(Method::PUT, path, Bytes::new()).await?.ok()?;
        self.owes_maintenance = false;
        Ok(())
    }

    async fn put(&self) -> Result<(), Error> {
        let path = Path::new("/v1/agent/service/register").query("replace-existing-checks", "true");
        let body = Bytes::from(self.document().to_string());
        self.client.keep(Method::PUT, path, body).await?.ok().map(|_| ())
    }

    async fn deregister(&self) -> Result<(), Error> {
        let path = Path::new("/v1/agent/service/deregister/").segment(&self.definition.instance.id);
        let answer = self.client.keep(Method::PUT, path, Bytes::new()).await?;
        if answer.status != StatusCode::NOT_FOUND {
            answer.ok()?;
        }
        tracing::info!(service = &*self.definition.service, id = &*self.definition.instance.id, "deregistered");
        Ok(())
    }

    fn check_id(&self, number: usize) -> String {
        format!("{}:check-{number}", self.definition.instance.id)
    }

    /// The registration as the agent reads it.
    fn document(&self) -> Value {
        let ServiceDefinition { service, instance, warning_weight, checks, .. } = &self.definition;
        let (address, port) = match &instance.address {
            Address::Socket(address) => (address.ip().to_string(), address.port()),
            Address::Name(host, port) => (host.to_string(), *port),
            other => (other.to_string(), 0),
        };
        let checks: Vec<Value> =
            checks.iter().enumerate().map(|(number, check)| document_of(check, self.check_id(number))).collect();
        let mut document = json!({
            "ID": &*instance.id,
            "Name": &**service,
            "Tags": instance.tags,
            "Address": address,
            "Port": port,
            "Meta": answer::meta(instance),
            "Weights": { "Passing": instance.weight, "Warning": warning_weight },
            "Checks": checks,
        });
        if let (Address::Unix(path), Some(document)) = (&instance.address, document.as_object_mut()) {
            document.insert("SocketPath".into(), path.to_string_lossy().into());
            document.insert("Address".into(), "".into());
        }
        document
    }
}

/// A check as the agent reads it.
fn document_of(check: &HealthCheck, id: String) -> Value {
    let duration = |duration: Duration| format!("{}ms", duration.as_millis().max(1));
    let mut document = Map::new();
    let mut set = |key: &str, value: Value| document.insert(key.to_owned(), value);
    set("CheckID", id.clone().into());
    set("Name", id.into());
    match &check.kind {
        CheckKind::Http { url, insecure } => {
            set("HTTP", url.as_str().into());
            set("TLSSkipVerify", (*insecure).into());
        }
        CheckKind::Tcp(target) => {
            set("TCP", target.as_str().into());
        }
        CheckKind::Grpc { target, tls } => {
            set("GRPC", target.as_str().into());
            set("GRPCUseTLS", (*tls).into());
        }
        CheckKind::Ttl => {
            set("TTL", duration(check.interval).into());
        }
    }
    if check.kind != CheckKind::Ttl {
        set("Interval", duration(check.interval).into());
        if let Some(timeout) = check.timeout {
            set("Timeout", duration(timeout).into());
        }
        if check.successes_before_passing > 1 {
            set("SuccessBeforePassing", check.successes_before_passing.into());
        }
        if check.failures_before_critical > 1 {
            set("FailuresBeforeCritical", check.failures_before_critical.into());
        }
    }
    set("Status", status(check.initial).into());
    if let Some(after) = check.deregister_critical_after {
        set("DeregisterCriticalServiceAfter", duration(after).into());
    }
    document.into()
}

pub(super) fn status(health: Health) -> &'static str {
    match health {
        Health::Passing => "passing",
        Health::Warning => "warning",
        Health::Critical => "critical",
    }
}

// === impl Handle ===

impl Handle {
    fn ask(&self, command: Command) -> Pending<()> {
        let handle = self.0.clone();
        Box::pin(async move {
            let gone = || Error::unavailable("the registration's runtime is gone");
            let (done, answer) = oneshot::channel();
            handle.send((command, done)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        })
    }
}

impl Membership for Handle {
    fn deregister(self: Box<Self>) -> Pending<()> {
        self.ask(Command::Deregister)
    }

    fn maintenance(&self, reason: Option<String>) -> Pending<()> {
        self.ask(Command::Maintenance(reason))
    }

    fn report(&self, health: Health, note: String) -> Pending<()> {
        self.ask(Command::Report(health, note))
    }

    fn confirm(&self) -> Pending<()> {
        self.ask(Command::Confirm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(check: &HealthCheck) -> Value {
        document_of(check, "c".into())
    }

    #[test]
    fn a_check_says_all_that_was_asked_for_in_the_agents_words() {
        let check = HealthCheck::http("https://a/health").interval(Duration::from_secs(2)).in_a_row(2, 3);
        let check = check.timeout(Duration::from_millis(300)).initial(Health::Warning);
        let check = check.deregister_critical_after(Duration::from_secs(600));
        let expected = json!({
            "CheckID": "c", "Name": "c", "HTTP": "https://a/health", "TLSSkipVerify": false, "Interval": "2000ms",
            "Timeout": "300ms", "Status": "warning", "SuccessBeforePassing": 2, "FailuresBeforeCritical": 3,
            "DeregisterCriticalServiceAfter": "600000ms",
        });
        assert_eq!(said(&check), expected);
        let (tcp, grpc) = (said(&HealthCheck::tcp("a:1")), said(&HealthCheck::grpc("a:1/s")));
        assert_eq!((&tcp["TCP"], &tcp["Status"], &tcp["Timeout"]), (&json!("a:1"), &json!("critical"), &Value::Null));
        assert_eq!((&grpc["GRPC"], &grpc["GRPCUseTLS"]), (&json!("a:1/s"), &json!(false)));
        let ttl = said(&HealthCheck::ttl(Duration::from_secs(15)).in_a_row(2, 2));
        assert_eq!(ttl, json!({"CheckID": "c", "Name": "c", "TTL": "15000ms", "Status": "critical"}));
    }
}
