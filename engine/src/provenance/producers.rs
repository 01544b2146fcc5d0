//! Which request gave which graph, so that a build that is given the graph can tell where it came from.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use slipway_spec::Digest;

use super::request::Request;

/// What the builds that run have given, by what the graphs end in. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Producers(Arc<Mutex<BTreeMap<Digest, Vec<Arc<Request>>>>>);

/// Something in the table; dropping it takes it out.
#[derive(Debug)]
pub(crate) struct Produced {
    producers: Producers,
    digest: Digest,
    request: Arc<Request>,
}

impl Producers {
    /// Says what a graph came from for as long as the answer is kept.
    pub(crate) fn add(&self, digest: Digest, request: Request) -> Produced {
        let request = Arc::new(request);
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(digest.clone()).or_default().push(request.clone());
        Produced { producers: self.clone(), digest, request }
    }

    /// Returns what graphs came from, where all who gave a graph were asked the same.
    pub(crate) fn requests(&self, inputs: &BTreeMap<String, Digest>) -> BTreeMap<String, Request> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |digest: &Digest| {
            let mut all = known.get(digest)?.iter().map(|request| {
                let mut request = Request::clone(request);
                // What surrounds the build that is told of is told there.
                request.request.root = None;
                request
            });
            let first = all.next()?;
            all.all(|other| other == first).then_some(first)
        };
        inputs.iter().filter_map(|(name, digest)| Some((name.clone(), find(digest)?))).collect()
    }
}

impl Drop for Produced {
    fn drop(&mut self) {
        let mut known = self.producers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(requests) = known.get_mut(&self.digest) {
            requests.retain(|request| !Arc::ptr_eq(request, &self.request));
            if requests.is_empty() {
                known.remove(&self.digest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(frontend: &str) -> Request {
        let mut request = Request::default();
        request.request.frontend = frontend.into();
        request
    }

    #[test]
    fn a_graph_has_the_request_that_all_agree_on() {
        let producers = Producers::default();
        let digest = Digest::of(b"graph");
        let inputs = BTreeMap::from([("a".to_owned(), digest.clone())]);
        assert!(producers.requests(&inputs).is_empty());
        let mut rooted = request("one");
        rooted.request.root = Some(Box::new(request("outer")));
        let first = producers.add(digest.clone(), rooted);
        let second = producers.add(digest.clone(), request("one"));
        assert_eq!(producers.requests(&inputs)["a"], request("one"));
        let third = producers.add(digest, request("two"));
        assert!(producers.requests(&inputs).is_empty());
        drop((first, second));
        assert_eq!(producers.requests(&inputs)["a"], request("two"));
        drop(third);
        assert!(producers.requests(&inputs).is_empty());
    }
}
