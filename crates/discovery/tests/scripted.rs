//! An agent that says what it is told: what a real one does seldom, or only a newer one.
#![cfg(feature = "consul")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod support;

use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use futures::StreamExt;
use portcullis_core::Instance;
use portcullis_discovery::consul::{Consistency, RsConsul};
use portcullis_discovery::{ConsulConfig, ConsulRegistry, DiscoveryLayer, Error, Registry, ServiceDefinition, Watch};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What was asked, and what to answer to it: `None` says nothing and keeps the connection.
struct Agent {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Agent {
    /// Answers every request for health or to the catalog's writers with what `script` makes of its number and target; to
    /// what else is asked, as one who may read everything.
    async fn start(script: impl Fn(usize, &str) -> Option<String> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let (log, script) = (asked.clone(), Arc::new(script));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, log.clone(), script.clone()));
            }
        });
        Self { url, asked }
    }

    fn config(&self) -> ConsulConfig {
        ConsulConfig::new(&self.url).unwrap()
    }

    /// For whoever waits for the end of its patience.
    fn hasty(&self) -> ConsulConfig {
        self.config().timeout(Duration::from_millis(600))
    }

    fn watch(&self) -> Watch {
        ConsulRegistry::new(self.config()).unwrap().watch(&"orders".into())
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve(
    mut stream: TcpStream,
    asked: Arc<Mutex<Vec<String>>>,
    script: Arc<impl Fn(usize, &str) -> Option<String> + Send + Sync>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let target = String::from_utf8(head).unwrap().split_whitespace().nth(1).unwrap().to_owned();
    let scripted = ["/v1/health/service/", "/v1/catalog/register", "/v1/catalog/deregister"];
    let answer = if scripted.iter().any(|path| target.starts_with(path)) {
        let number = {
            let mut asked = asked.lock().unwrap();
            asked.push(target.clone());
            asked.len() - 1
        };
        script(number, &target)
    } else if target.starts_with("/v1/agent/self") {
        Some(ok(1, "", r#"{"Config":{"NodeID":"n"}}"#))
    } else if target.starts_with("/v1/catalog/nodes") {
        Some(ok(1, "", r#"[{"Node":"n"}]"#))
    } else {
        Some("HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 2\r\n\r\n[]".to_owned())
    };
    match answer {
        Some(answer) if answer.starts_with("drip") => {
            // A byte every 50 ms never misses a read timeout.
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nx-consul-index: 9\r\ncontent-length: 1000\r\n\r\n").await;
            while stream.write_all(b" ").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Some(answer) => {
            let _ = stream.write_all(answer.as_bytes()).await;
        }
        None => std::future::pending().await,
    }
}

fn ok(index: u64, headers: &str, body: &str) -> String {
    answer("200 OK", &format!("x-consul-index: {index}\r\nx-consul-knownleader: true\r\n{headers}"), body)
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}")
}

fn instances(ids: &[&str]) -> String {
    let one = |id| format!(r#"{{"Node":{{"Address":"127.0.0.1"}},"Service":{{"ID":"{id}","Port":80}}}}"#);
    format!("[{}]", ids.iter().map(one).collect::<Vec<_>>().join(","))
}

async fn next(watch: &mut Watch) -> Result<Vec<String>, Error> {
    let ids = |instances: Vec<Instance>| instances.iter().map(|instance| instance.id.to_string()).collect();
    tokio::time::timeout(Duration::from_secs(20), watch.next()).await.expect("an answer in time").unwrap().map(ids)
}

#[tokio::test]
async fn an_index_that_goes_back_asks_anew_and_none_is_not_believed() {
    let agent = Agent::start(|number, _| match number {
        0 => Some(ok(38, "", &instances(&["a", "b"]))),
        1 => Some(ok(12, "", "[]")),
        2 => Some(ok(12, "", "[]")),
        3 => Some(ok(13, "", "[]")),
        4 => Some(ok(14, "", &instances(&["c"]))),
        5 => Some(ok(15, "", "[]")),
        _ => None,
    })
    .await;
    let mut watch = agent.watch();
    assert_eq!(next(&mut watch).await.unwrap(), ["a", "b"]);
    for _ in 0..3 {
        assert!(next(&mut watch).await.unwrap_err().is_reset());
    }
    assert_eq!(next(&mut watch).await.unwrap(), ["c"]);
    assert_eq!(next(&mut watch).await.unwrap(), [""; 0], "now it is believed");
    let asked: Vec<_> = agent
        .asked()
        .iter()
        .map(|target| target.split("index=").nth(1).map(|rest| rest.split('&').next().unwrap().to_owned()))
        .collect();
    let index = |index: &str| Some(index.to_owned());
    assert_eq!(asked[..6], [None, index("38"), None, index("12"), index("13"), index("14")]);
}

/// An agent to which the servers stream what changes never says then that there is a leader.
#[tokio::test]
async fn what_is_streamed_counts_and_none_is_asked_of_the_servers() {
    let streamed = |index: u64, body: &str| {
        let headers = "x-consul-knownleader: false\r\nx-consul-query-backend: streaming\r\n";
        Some(answer("200 OK", &format!("x-consul-index: {index}\r\n{headers}"), body))
    };
    let agent = Agent::start(move |number, target| match number {
        0 => Some(ok(10, "", &instances(&["a"]))),
        1 => streamed(11, &instances(&["a", "b"])),
        2 => streamed(12, "[]"),
        3 if !target.contains("index=") => Some(ok(12, "", "[]")),
        _ => None,
    })
    .await;
    let mut watch = agent.watch();
    assert_eq!(next(&mut watch).await.unwrap(), ["a"]);
    assert_eq!(next(&mut watch).await.unwrap(), ["a", "b"]);
    assert_eq!(next(&mut watch).await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn an_index_of_nothing_never_spins() {
    let agent = Agent::start(|_, _| Some(ok(0, "", &instances(&["a"])))).await;
    let mut watch = agent.watch();
    assert_eq!(next(&mut watch).await.unwrap(), ["a"]);
    assert!(tokio::time::timeout(Duration::from_secs(2), watch.next()).await.is_err(), "nothing changed");
    let asked = agent.asked();
    assert!(asked[1].contains("index=1&"), "{asked:?}");
    assert!(asked.len() <= 8 + 2 * 4 + 2, "asked {} times in two seconds", asked.len());
}

#[tokio::test]
async fn no_leader_is_a_failure_whatever_else_is_said() {
    let agent = Agent::start(|number, _| match number {
        0 => Some(ok(5, "", &instances(&["a"]))),
        1 => Some(answer("500 Internal Server Error", "", "No cluster leader")),
        2 => Some(answer("200 OK", "x-consul-index: 6\r\nx-consul-knownleader: false\r\n", "[]")),
        3 => Some(answer("200 OK", "x-consul-index: 6\r\n", "[]")),
        4 => Some(ok(7, "", &instances(&["b"]))),
        _ => None,
    })
    .await;
    let mut watch = agent.watch();
    assert_eq!(next(&mut watch).await.unwrap(), ["a"]);
    for _ in 0..3 {
        assert!(next(&mut watch).await.unwrap_err().is_no_leader());
    }
    assert_eq!(next(&mut watch).await.unwrap(), ["b"]);
    let asked = agent.asked();
    assert!(asked[2..5].iter().all(|target| !target.contains("index=")), "after a failure everything is asked for");
}

#[tokio::test]
async fn a_newer_agent_says_that_the_token_may_not_read() {
    let agent = Agent::start(|number, _| match number {
        0 => Some(ok(5, "x-consul-results-filtered-by-acls: true\r\n", "[]")),
        1 => Some(ok(6, "x-consul-results-filtered-by-acls: true\r\n", &instances(&["a"]))),
        _ => None,
    })
    .await;
    let mut watch = agent.watch();
    assert!(next(&mut watch).await.unwrap_err().is_denied());
    assert_eq!(next(&mut watch).await.unwrap(), ["a"], "what may be read counts");
}

#[tokio::test]
async fn slow_broken_large_and_wrong_answers_are_failures() {
    let agent = Agent::start(|number, _| match number {
        0 => Some("drip".to_owned()),
        1 => None,
        2 => Some("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n[".to_owned()),
        3 => Some(ok(1, "", &format!("[{}]", " ".repeat(3_000_000)))),
        4 => Some(ok(1, "", "<html>")),
        5 => Some(answer("429 Too Many Requests", "", "later")),
        6 => Some(ok(
            2,
            "",
            &instances(
                &(0..1000).map(|_| "x".repeat(1000)).collect::<Vec<_>>().iter().map(|s| &**s).collect::<Vec<_>>(),
            ),
        )),
        _ => None,
    })
    .await;
    let registry = ConsulRegistry::new(agent.hasty().max_body(2_000_000)).unwrap();
    let mut watch = registry.watch(&"orders".into());
    for number in 0..6 {
        // The back-off is real; the deadline of each call is not part of it.
        let error = tokio::time::timeout(Duration::from_secs(20), watch.next()).await.unwrap().unwrap().unwrap_err();
        assert!(error.is_unavailable(), "{number}: {error:?}");
    }
    assert_eq!(next(&mut watch).await.unwrap().len(), 1000, "a million bytes are no failure");
}

#[tokio::test]
async fn every_option_reaches_the_agent_encoded() {
    let agent = Agent::start(|_, _| Some(ok(3, "", "[]"))).await;
    let config = agent.config().datacenter("d c").namespace("n&s").partition("p").near("_agent");
    let config = config.filter("\"v2\" in Service.Tags").tag("a=b").tag("c").consistency(Consistency::Stale);
    let mut watch = ConsulRegistry::new(config.include_warning(true)).unwrap().watch(&"or/ders?x".into());
    next(&mut watch).await.unwrap();
    assert_eq!(
        agent.asked()[0],
        "/v1/health/service/or%2Fders%3Fx?ns=n%26s&partition=p&dc=d%20c&near=_agent\
         &filter=%22v2%22%20in%20Service.Tags&tag=a%3Db&tag=c&stale"
    );
    let agent = Agent::start(|_, _| Some(ok(3, "", "[]"))).await;
    for (consistency, word) in [(Consistency::Cached, "&cached"), (Consistency::Consistent, "&consistent")] {
        let registry = ConsulRegistry::new(agent.config().consistency(consistency)).unwrap();
        next(&mut registry.watch(&"orders".into())).await.unwrap();
        assert!(agent.asked().iter().any(|target| target.ends_with(word)), "{word}");
    }
}

#[tokio::test]
async fn a_watch_dropped_at_any_await_gives_everything_back() {
    // Every watch gets one answer; what blocks after that blocks for ever.
    let agent = Agent::start(|_, target| (!target.contains("index=")).then(|| ok(3, "", &instances(&["a"])))).await;
    // One place for queries that block: a watch that kept it would park all that come after.
    let registry = ConsulRegistry::new(agent.config().connections(1)).unwrap();
    let blocked = || agent.asked().iter().filter(|target| target.contains("index=3&")).count();
    let mut reached = 0;
    for polls in 0..30 {
        let (mut watch, mut left) = (registry.watch(&"orders".into()), polls);
        let polled = std::future::poll_fn(|cx| {
            while left > 0 {
                left -= 1;
                if watch.poll_next_unpin(cx).is_pending() {
                    return Poll::Pending;
                }
            }
            Poll::Ready(())
        });
        let all = tokio::time::timeout(Duration::from_millis(50), polled).await;
        reached = if all.is_ok() { polls } else { reached };
        drop(watch);
        let (mut next_watch, before) = (registry.watch(&"orders".into()), blocked());
        assert_eq!(next(&mut next_watch).await.unwrap(), ["a"], "after {polls} polls");
        let waiting = tokio::spawn(async move { next_watch.next().await.is_some() });
        support::until(async || blocked() > before).await;
        waiting.abort();
        assert!(waiting.await.is_err());
    }
    assert!(reached > 4, "dropped at {reached} awaits only");
}

#[tokio::test]
async fn an_answer_that_drips_empties_no_pool_and_is_given_up_in_time() {
    let agent = Agent::start(|number, _| match number {
        0 => Some(ok(5, "", &instances(&["a"]))),
        1 => Some("drip".to_owned()),
        2 => Some(ok(6, "", &instances(&["b"]))),
        _ => None,
    })
    .await;
    // A blocking query: a second, its sixteenth, and the margin of 0.6 s.
    let registry = ConsulRegistry::new(agent.hasty().wait(Duration::from_secs(1))).unwrap();
    let layer = DiscoveryLayer::new(registry).service("orders");
    support::until(async || support::seen(&layer).await == ["a"]).await;
    let (start, flow) = (tokio::time::Instant::now(), support::Flow::start(&layer));
    support::until(async || layer.status()[0].failures == 1).await;
    let given_up = start.elapsed();
    assert!((Duration::from_millis(1_000)..Duration::from_secs(9)).contains(&given_up), "{given_up:?}");
    support::until(async || support::seen(&layer).await == ["b"]).await;
    flow.end("an answer that drips");
}

#[tokio::test]
async fn a_service_that_changes_all_the_time_is_asked_for_at_a_bounded_rate() {
    let agent = Agent::start(|number, _| Some(ok(1 + number as u64, "", &instances(&["a"])))).await;
    let mut watch = agent.watch();
    let all_the_time = async { while next(&mut watch).await.is_ok() {} };
    assert!(tokio::time::timeout(Duration::from_secs(2), all_the_time).await.is_err());
    let asked = agent.asked().len();
    assert!((9..=8 + 2 * 4 + 2).contains(&asked), "asked {asked} times in two seconds");
}

/// What arrived although its answer did not, or though nobody waits for that, stayed for ever.
#[tokio::test]
async fn an_external_registration_without_an_answer_is_taken_back() {
    let agent = Agent::start(|_, target| target.starts_with("/v1/catalog/deregister").then(|| ok(1, "", "true"))).await;
    let catalog = RsConsul::new(agent.hasty()).unwrap();
    let definition = ServiceDefinition::new("mail", "m", support::at(25));
    let asked = |what: &str| agent.asked().iter().filter(|target| target.starts_with(what)).count();
    assert!(catalog.register(definition.clone()).await.unwrap_err().is_unavailable());
    support::until(async || asked("/v1/catalog/deregister") == 1).await;
    let registering =
        tokio::spawn(RsConsul::new(agent.config().timeout(Duration::from_secs(60))).unwrap().register(definition));
    support::until(async || asked("/v1/catalog/register") == 2).await;
    registering.abort();
    support::until(async || asked("/v1/catalog/deregister") == 2).await;
}
